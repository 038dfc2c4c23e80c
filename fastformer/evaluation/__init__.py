"""What a model is worth: perplexity, labels, written text, with intervals, significance and a report."""
