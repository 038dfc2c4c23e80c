"""Environments whose observations are texts: MiniGrid's missions in words, and TextWorld's games.

Actions are numbers, or texts (``spaces.Text``): then ``info["choices"]`` lists those that are admissible now, and any
other is the environment's to judge.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from ..extras import require

gymnasium = require("gymnasium", "fastformer.rl's environments", "rl")
spaces = require("gymnasium.spaces", "fastformer.rl's environments", "rl")

TEXT = string.printable
LONGEST, LONGEST_COMMAND = 100_000, 190
# name -> rooms, objects, length of the quest; any other name is the path of a game's file
GAMES = {"small": (2, 4, 2), "medium": (3, 6, 3), "large": (6, 10, 5)}


class MiniGridText(gymnasium.ObservationWrapper, gymnasium.utils.RecordConstructorArgs):
    """What a MiniGrid agent sees, in words, nearest first: ``go to the red door. a closed red door 2 ahead 1 left``.

    Actions stay MiniGrid's numbers: 0 left, 1 right, 2 forward, 3 pick up, 4 drop, 5 toggle, 6 done.

    Args:
        env: one with ``mission``, ``direction`` and ``image`` in its observations.
    """

    def __init__(self, env: Any) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self)
        gymnasium.ObservationWrapper.__init__(self, env)
        constants = require("minigrid.core.constants", "MiniGridText", "rl")
        self._kinds = constants.IDX_TO_OBJECT
        self._colours = constants.IDX_TO_COLOR
        self._states = {number: name for name, number in constants.STATE_TO_IDX.items()}
        self.observation_space = spaces.Text(LONGEST, charset=TEXT)

    def observation(self, observation: dict[str, Any]) -> str:
        return self.describe(observation)

    def describe(self, observation: dict[str, Any]) -> str:
        """The observation in words. The agent is in the middle of the view's last row and looks up."""
        image = observation["image"]
        middle, last = image.shape[0] // 2, image.shape[1] - 1
        seen = []
        for x in range(image.shape[0]):
            for y in range(image.shape[1]):
                kind = self._kinds[int(image[x, y, 0])]
                if (x, y) == (middle, last) or kind in ("unseen", "empty", "floor", "wall"):
                    continue
                thing = f"{self._colours[int(image[x, y, 1])]} {kind}"
                if kind == "door":
                    thing = f"{self._states[int(image[x, y, 2])]} {thing}"
                ahead, aside = last - y, x - middle
                where = f"{ahead} ahead" if ahead else ""
                if aside:
                    where = f"{where} {abs(aside)} {'right' if aside > 0 else 'left'}".strip()
                seen.append((ahead + abs(aside), ahead, aside, f"a {thing} {where}"))
        parts = [str(observation["mission"]), *(text for *_, text in sorted(seen))]
        ways = {"ahead": (middle, last - 1), "left": (middle - 1, last), "right": (middle + 1, last)}
        parts += [f"wall {name}" for name, (x, y) in ways.items() if self._kinds[int(image[x, y, 0])] == "wall"]
        if (kind := self._kinds[int(image[middle, last, 0])]) not in ("unseen", "empty", "floor", "agent", "wall"):
            parts.append(f"carrying a {self._colours[int(image[middle, last, 1])]} {kind}")
        return ". ".join(parts)


class TextWorldGame(gymnasium.Env):
    """One TextWorld game (Côté et al. 2018): texts in, admissible commands to choose from, the score's rise as reward.

    Args:
        game: a size of :data:`GAMES`, generated and compiled once into ``directory``; or the path of a game's file.
        seed: of the generated game.
        max_steps: commands before the episode is truncated.
        directory: where games are kept.
        memory: rooms described before stay in the observation, as far as so many last answers of the game go.
    """

    def __init__(
        self,
        game: str = "small",
        *,
        seed: int = 1,
        max_steps: int = 30,
        directory: str = "~/.cache/fastformer/textworld",
        memory: int = 1,
    ) -> None:
        if max_steps < 1:
            raise ValueError(f"max_steps: got {max_steps}, expected at least 1")
        if memory < 0:
            raise ValueError(f"memory: got {memory}, expected at least 0")
        textworld = require("textworld", f"the environment textworld:{game}", "rl")
        path = Path(game).expanduser()
        if game in GAMES:
            path = self._compiled(textworld, game, seed, Path(directory).expanduser())
        elif not path.is_file():
            raise ValueError(f"environment: textworld:{game} is neither one of {', '.join(GAMES)} nor a game's file")
        self._infos = textworld.EnvInfos(
            admissible_commands=True, description=True, inventory=True, objective=True, policy_commands=True, won=True
        )
        self._game = textworld.start(str(path), request_infos=self._infos)
        self.max_steps, self.memory = max_steps, memory
        self.observation_space = spaces.Text(LONGEST, charset=TEXT)
        self.action_space = spaces.Text(LONGEST_COMMAND, charset=string.ascii_letters + string.digits + " -'")
        self._steps, self._score, self._answers = 0, 0, []

    @staticmethod
    def _compiled(textworld: Any, game: str, seed: int, directory: Path) -> Path:
        path = directory / f"{game}-{seed}.z8"
        if not path.is_file():
            directory.mkdir(parents=True, exist_ok=True)
            options = textworld.GameOptions()
            options.nb_rooms, options.nb_objects, options.quest_length = GAMES[game]
            options.seeds, options.path = seed, str(path)
            textworld.make(options)
        return path

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        state = self._game.reset()
        self._steps, self._score, self._answers = 0, 0, []
        return self._seen(state), self._info(state)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        state, score, done = self._game.step(action)
        self._steps += 1
        reward, self._score = float(score - self._score), score
        self._answers = [*self._answers, f"{action}: {' '.join(str(state.feedback).split())}"][-self.memory :]
        return self._seen(state), reward, bool(done), not done and self._steps >= self.max_steps, self._info(state)

    def close(self) -> None:
        self._game.close()

    def _seen(self, state: Any) -> str:
        """Goal, place, possessions, and the last answers."""
        parts = [state.objective, state.description, state.inventory, *(self._answers if self.memory else ())]
        text = " | ".join(" ".join(str(part).split()) for part in parts if part)
        return "".join(c for c in text if c in TEXT)

    def _info(self, state: Any) -> dict[str, Any]:
        return {"choices": list(state.admissible_commands or ()), "walkthrough": list(state.policy_commands or ())}
