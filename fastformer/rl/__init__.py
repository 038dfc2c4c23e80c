"""Reinforcement learning: environments, agents, policy optimisation for language models, applications."""
