"""The command `dfa-rewrite`, called from Python."""

import json
import logging
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_log = logging.getLogger("ditfastattn")


class RewriteError(RuntimeError):
    """`dfa-rewrite` did not write a model.

    `message` is what it said. `exit_code` is 1 where it ran and the answer is no (nothing to rewrite, the plan does not fit), 2 for bad
    input, usage or I/O; negative if a signal ended it.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(f"{message} (exit code {exit_code})")
        self.message = message
        self.exit_code = exit_code


def rewrite(
    model: str | os.PathLike[str],
    plan: str | os.PathLike[str] | Mapping[str, Any],
    output: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    flags: Sequence[str] = (),
) -> Path:
    """Rewrites an exported model under a plan and returns the path of what was written.

    `plan`: a file, or its content. `output`: None means beside the model, with `.dfa.onnx`; where weights are stored outside the model's
    file it must be in the same folder. `force` overwrites it. `flags`: further flags of the command, such as
    `["--request-inputs", "required"]`. The report goes to the logger `ditfastattn` at level INFO.

    Raises RewriteError with the command's message and exit code, and FileNotFoundError if the command is not installed.
    """
    model = Path(model)
    output = model.with_suffix(".dfa.onnx") if output is None else Path(output)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(plan, Mapping):
            path = Path(folder) / "plan.json"
            path.write_text(json.dumps(dict(plan)), encoding="utf-8")
        else:
            path = Path(plan)
        command = [get_program_path(), os.fspath(model), "--plan", os.fspath(path), "--output", os.fspath(output), *flags]
        if force:
            command.append("--force")
        said = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if said.returncode != 0:
        message = said.stderr.strip().removeprefix("dfa-rewrite: ")
        raise RewriteError(message or "dfa-rewrite ended without a message", said.returncode)
    _log.info("%s", said.stdout.rstrip())
    return output


def get_program_path() -> str:
    """The path of `dfa-rewrite`: where pip put it with this package, else the first one on PATH.

    Raises FileNotFoundError if there is none.
    """
    places = list(_programs())
    for path in places:
        if path.is_file():
            return str(path)
    found = shutil.which("dfa-rewrite")
    if found is None:
        looked = ", ".join(str(path.parent) for path in places)
        raise FileNotFoundError(f"no dfa-rewrite in {looked} or on PATH: expected the one that the wheel of ditfastattn brings; install the wheel")
    return found


def _programs() -> Iterator[Path]:
    # An environment, `pip install --user`, `pip install --target`.
    yield Path(sysconfig.get_path("scripts")) / "dfa-rewrite"
    yield Path(sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))) / "dfa-rewrite"
    yield Path(__file__).parents[1] / "bin" / "dfa-rewrite"
