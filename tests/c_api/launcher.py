"""CMake's compiler launcher in the test: an object that setup.py has compiled from the same file with the same flags is
copied instead of compiled again. Run as ``launcher.py <compiler> <arguments>``."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build" / str(sysconfig.get_config_var("SOABI"))
IGNORED = {"-DNDEBUG", "-Dfastformer_EXPORTS"}  # no kernel asks for them


def flags(arguments: list[str]) -> tuple[list[str], str]:
    """What decides on the object: definitions, language, code generation; and the level of optimisation, given last."""
    levels = [a for a in arguments if a.startswith("-O")]
    kept = {a for a in arguments if re.match("-[Dfm]|-std=", a)} - IGNORED
    return sorted(kept), levels[-1] if levels else ""


def built(source: Path, arguments: list[str]) -> Path | None:
    """setup.py's object, if it is newer than everything that could have gone into it."""
    ninja = BUILT / "build.ninja"
    edges = re.findall(r"^build (\S+): cxx (\S+)\n  flags = (.*)$", ninja.read_text(), re.M) if ninja.exists() else []
    read = [ROOT / "csrc" / "checks.h", *(ROOT / "csrc" / "cpu").iterdir(), *(ROOT / "csrc" / "include").iterdir()]
    changed = max(path.stat().st_mtime for path in read)
    for name, path, given in edges:
        compiled = BUILT / name
        same = Path(path) == source and flags(shlex.split(given)) == flags(arguments)
        if same and compiled.exists() and compiled.stat().st_mtime > changed:
            return compiled
    return None


def main(command: list[str]) -> int:
    value = {flag: command[i + 1] for i, flag in enumerate(command) if flag in ("-c", "-o", "-MF")}
    found = built(Path(value["-c"]).resolve(), command[1:]) if "-c" in value and "-o" in value else None
    if found is None:
        return subprocess.run(command).returncode
    shutil.copyfile(found, value["-o"])
    if "-MF" in value:
        Path(value["-MF"]).write_text(f"{value['-o']}: {value['-c']}{os.linesep}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
