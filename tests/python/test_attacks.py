"""Hostile files: refused with a reason, in bounded memory, with nothing written and nothing opened that is not theirs."""

import json
import os
import resource
import shutil
import signal
import subprocess

import numpy as np
import pytest
from conftest import FIXTURES, TARGET

pytest.importorskip("onnx", reason="builds its models with the onnx package")
import hostile  # noqa: E402

PLAN = {"format": "ditfastattn-plan", "version": 1, "cfg": "cond-first", "steps": [["full"], ["ast"]]}
# What the program takes for itself; on top of it a file may cost four times its size.
OWN = 256 << 20


def run(folder, *arguments, memory=None, limits=()):
    """Runs dfa-rewrite in `folder`; `memory` bounds its address space in bytes."""

    def bound():
        if memory:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        for which, value in limits:
            resource.setrlimit(which, (value, value))
            # The default ends the process; a write beyond the limit shall fail instead.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    command = [TARGET / "dfa-rewrite", *map(str, arguments)]
    before = bound if memory or limits else None
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", preexec_fn=before, timeout=300)


def place(folder, data):
    (folder / "model.onnx").write_bytes(data)
    (folder / "plan.json").write_text(json.dumps(PLAN))


REWRITE = ["model.onnx", "--plan", "plan.json", "--quiet"]


def said(folder, data, words, memory=None):
    """Both commands end in time and in memory, without a crash; where `words` are given they refuse with them."""
    place(folder, data)
    before = sorted(os.listdir(folder))
    for command in (["inspect", "model.onnx"], REWRITE):
        result = run(folder, *command, memory=memory)
        assert result.returncode in (0, 1, 2), (command, result.returncode, result.stderr[-300:])
        if words is not None:
            assert result.returncode == 2, (command, result.stdout[:300], result.stderr[-300:])
            for word in words:
                assert word in result.stderr, (command, result.stderr[-300:])
            assert len(result.stderr) < 1000
        if result.returncode:
            assert sorted(os.listdir(folder)) == before


def test_the_honest_model_is_rewritten(tmp_path):
    """Else nothing here would prove anything."""
    place(tmp_path, hostile.honest().SerializeToString())
    result = run(tmp_path, *REWRITE)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "model.dfa.onnx").exists()


@pytest.mark.parametrize("name,data,words", [pytest.param(*case, id=case[0]) for case in hostile.external()])
def test_external_data_never_leads_out_of_the_folder(name, data, words, tmp_path):
    said(tmp_path, data, words)


@pytest.mark.parametrize("name,data,words", [pytest.param(*case, id=case[0]) for case in hostile.contradictions()])
def test_contradictions_do_not_crash(name, data, words, tmp_path):
    said(tmp_path, data, words)


@pytest.mark.parametrize("index", range(15), ids=[case[0] for case in hostile.bombs(1 << 16)])
def test_bombs_cost_at_most_four_times_their_size(index, tmp_path):
    _, data, words = next(case for i, case in enumerate(hostile.bombs()) if i == index)
    said(tmp_path, data, words, memory=OWN + 4 * len(data))


@pytest.mark.parametrize("name,data,words", [pytest.param(*case, id=case[0]) for case in hostile.functions()])
def test_functions_that_multiply_cost_no_more_than_other_bombs(name, data, words, tmp_path):
    said(tmp_path, data, words, memory=OWN + 4 * len(data))


def test_a_node_with_many_inputs_does_not_take_the_square_of_their_number(tmp_path):
    place(tmp_path, hostile.crowded())
    for command in (["inspect", "model.onnx"], REWRITE):
        # Seconds of the processor. Two are taken; the square took 29 and more.
        result = run(tmp_path, *command, limits=[(resource.RLIMIT_CPU, 20)])
        assert result.returncode == 0, (command, result.returncode, result.stderr[-300:])


def linked(folder, link):
    """A model whose weights file is made by `link` from a file elsewhere."""
    (folder / "elsewhere").mkdir()
    secret = folder / "elsewhere" / "secret"
    secret.write_bytes(b"\0" * 16)
    home = folder / "home"
    home.mkdir()
    model = hostile.honest()
    hostile.in_initializer(model, hostile.outside("weights.bin", name="w"))
    place(home, model.SerializeToString())
    link(secret, home / "weights.bin")
    return home


LINKS = {
    "symlink": (lambda secret, weights: weights.symlink_to(secret), "leads out of the model's folder"),
    "hardlink": (lambda secret, weights: os.link(secret, weights), "other names elsewhere"),
    "folder": (lambda secret, weights: weights.mkdir(), "is no file"),
    "device": (lambda secret, weights: weights.symlink_to("/dev/zero"), "leads out of the model's folder"),
}


@pytest.mark.parametrize("kind", LINKS)
def test_linked_weights_are_refused_unless_allowed(kind, tmp_path):
    link, words = LINKS[kind]
    home = linked(tmp_path, link)
    for command in (["inspect", "model.onnx"], REWRITE):
        result = run(home, *command)
        assert result.returncode == 2 and words in result.stderr and "`weights.bin`" in result.stderr, result.stderr
        assert run(home, *command, "--allow-linked-weights").returncode == 0


def test_a_symlinked_parent_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights.bin").write_bytes(b"\0" * 16)
    home = tmp_path / "home"
    home.mkdir()
    (home / "sub").symlink_to(tmp_path / "elsewhere")
    model = hostile.honest()
    hostile.in_initializer(model, hostile.outside("sub/weights.bin", name="w"))
    place(home, model.SerializeToString())
    result = run(home, *REWRITE)
    assert result.returncode == 2 and "leads out of the model's folder" in result.stderr


def test_the_cache_of_a_model_hub_is_accepted(tmp_path):
    """There both the model and its weights are links into a folder of blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    model = hostile.honest()
    hostile.in_initializer(model, hostile.outside("weights.bin", name="w"))
    (blobs / "a1").write_bytes(model.SerializeToString())
    (blobs / "b2").write_bytes(b"\0" * 16)
    (snapshot / "model.onnx").symlink_to(blobs / "a1")
    (snapshot / "weights.bin").symlink_to(blobs / "b2")
    (snapshot / "plan.json").write_text(json.dumps(PLAN))
    result = run(snapshot, *REWRITE)
    assert result.returncode == 0, result.stderr


def test_weights_are_not_opened(tmp_path):
    """A pipe in their place would block whoever opens it."""
    model = hostile.honest()
    hostile.in_initializer(model, hostile.outside("weights.bin", name="w"))
    place(tmp_path, model.SerializeToString())
    os.mkfifo(tmp_path / "weights.bin")
    assert run(tmp_path, *REWRITE, "--allow-linked-weights").returncode == 0


def test_files_without_end_are_refused(tmp_path):
    place(tmp_path, hostile.honest().SerializeToString())
    with open(tmp_path / "huge.onnx", "wb") as f:
        f.truncate(1 << 40)
    with open(tmp_path / "huge.json", "wb") as f:
        f.truncate(1 << 40)
    result = run(tmp_path, "inspect", "huge.onnx", memory=OWN)
    assert result.returncode == 2 and "2 GiB" in result.stderr, result.stderr
    for plan in ("huge.json", "/dev/zero"):
        result = run(tmp_path, "model.onnx", "--plan", plan, memory=OWN)
        assert result.returncode == 2 and "at most 4194304 bytes" in result.stderr, result.stderr


def test_a_billion_steps_are_refused(tmp_path):
    """As far as a file can say so at all: a plan lists its steps, and its size is bounded."""
    place(tmp_path, hostile.honest().SerializeToString())
    row = '["full"],'
    cut = '{"format": "ditfastattn-plan", "version": 1, "steps": [' + row * 10_000_000
    (tmp_path / "plan.json").write_text(cut + '["full"]]}')
    result = run(tmp_path, *REWRITE, memory=OWN)
    assert result.returncode == 2 and "at most 4194304 bytes" in result.stderr, result.stderr
    count = (4 << 20) // len(row) - 100
    (tmp_path / "plan.json").write_text('{"format": "ditfastattn-plan", "version": 1, "steps": [' + row * count + '["full"]]}')
    assert run(tmp_path, *REWRITE, memory=4 * OWN).returncode == 0
    (tmp_path / "plan.json").write_text('{"format": "ditfastattn-plan", "version": 1, "steps": 1000000000}')
    assert run(tmp_path, *REWRITE, memory=OWN).returncode == 2
    for steps in ("1000000000", "-1"):
        result = run(tmp_path, "search", "model.onnx", "-o", "p.json", "--delta", "0.1", "--calib", "c.npz", "--scheduler", "ddim", f"--steps={steps}", memory=OWN)
        assert result.returncode == 2 and "--steps" in result.stderr


# ---- truncation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "rewrite"])
def test_every_truncation_ends_in_an_answer(command, tmp_path):
    whole = hostile.honest().SerializeToString()
    assert len(whole) < 8000
    arguments = ["inspect", "model.onnx"] if command == "inspect" else REWRITE
    answers = set()
    # Both read the file the same way, so one of them is enough for every byte.
    for length in range(0, len(whole), 16 if command == "inspect" else 1):
        place(tmp_path, whole[:length])
        result = run(tmp_path, *arguments)
        assert result.returncode in (0, 1, 2), f"{length} of {len(whole)} bytes: exit {result.returncode}: {result.stderr[-300:]}"
        answers.add(result.returncode)
        if result.returncode:
            assert sorted(os.listdir(tmp_path)) == ["model.onnx", "plan.json"], length
        else:
            (tmp_path / "model.dfa.onnx").unlink(missing_ok=True)
    assert 2 in answers


# ---- writing: the original is intact, and nothing incomplete has the final name -----------------------------------------


@pytest.fixture
def work(tmp_path):
    shutil.copy(FIXTURES / "dit__ts17.onnx", tmp_path / "model.onnx")
    shutil.copy(FIXTURES / "dit.plan.json", tmp_path / "plan.json")
    return tmp_path


def intact(folder, *also):
    assert (folder / "model.onnx").read_bytes() == (FIXTURES / "dit__ts17.onnx").read_bytes()
    assert sorted(os.listdir(folder)) == sorted(["model.onnx", "plan.json", *also])


@pytest.mark.parametrize("kind", ["same", "dotted", "symlink", "hardlink"])
def test_the_output_is_never_the_model(kind, work):
    name = {"same": "model.onnx", "dotted": "./model.onnx"}.get(kind, "other.onnx")
    if kind == "symlink":
        (work / "other.onnx").symlink_to("model.onnx")
    if kind == "hardlink":
        os.link(work / "model.onnx", work / "other.onnx")
    result = run(work, *REWRITE, "-o", name, "--force")
    if kind == "hardlink":
        # Another name of the same file is replaced, the file is not.
        assert result.returncode == 0
    else:
        assert result.returncode == 2 and "is the model itself" in result.stderr
    intact(work, *(["other.onnx"] if name == "other.onnx" else []))


def test_an_output_that_is_a_link_is_replaced_and_not_followed(work):
    precious = work / "precious"
    precious.write_text("precious")
    (work / "out.onnx").symlink_to(precious)
    assert run(work, *REWRITE, "-o", "out.onnx").returncode == 2
    assert run(work, *REWRITE, "-o", "out.onnx", "--force").returncode == 0
    assert precious.read_text() == "precious" and not (work / "out.onnx").is_symlink()


@pytest.mark.parametrize("limit", [0, 1, 4096, 30000])
def test_a_full_disk_leaves_nothing(limit, work):
    (work / "model.dfa.onnx").write_text("the previous one")
    result = run(work, *REWRITE, "--force", limits=[(resource.RLIMIT_FSIZE, limit)])
    assert result.returncode == 2 and "cannot write" in result.stderr, result.stderr
    assert (work / "model.dfa.onnx").read_text() == "the previous one"
    intact(work, "model.dfa.onnx")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(work):
    work.chmod(0o555)
    try:
        result = run(work, *REWRITE)
    finally:
        work.chmod(0o755)
    assert result.returncode == 2 and "cannot write" in result.stderr
    intact(work)


def test_an_output_folder_without_room_for_new_files():
    """/proc takes no files from anybody, root included."""
    result = run("/", FIXTURES / "dit__ts17.onnx", "--plan", FIXTURES / "dit.plan.json", "-o", "/proc/out.onnx")
    assert result.returncode == 2 and "cannot write /proc/out.onnx" in result.stderr


def test_killed_at_any_moment(tmp_path):
    """Whenever it is: the output is complete or not there, and the next run cleans up."""
    model = hostile.honest()
    # Large enough that writing takes several calls.
    model.graph.initializer.append(hostile.helper.make_tensor("ballast", 1, [9 << 20], np.zeros(9 << 20, np.float32).tobytes(), raw=True))
    original = model.SerializeToString()
    place(tmp_path, original)
    assert run(tmp_path, *REWRITE).returncode == 0
    complete = (tmp_path / "model.dfa.onnx").read_bytes()
    (tmp_path / "model.dfa.onnx").unlink()
    outcomes = set()
    delay = 0.0005
    for attempt in range(60):
        process = subprocess.Popen([TARGET / "dfa-rewrite", *REWRITE, "--force"], cwd=tmp_path, stdout=subprocess.DEVNULL)
        try:
            process.wait(delay * attempt)
            outcomes.add("finished")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM if attempt % 4 == 3 else signal.SIGKILL)
            process.wait()
            outcomes.add("killed")
        assert (tmp_path / "model.onnx").read_bytes() == original
        output = tmp_path / "model.dfa.onnx"
        if output.exists():
            assert output.read_bytes() == complete
            output.unlink()
    assert "killed" in outcomes
    assert run(tmp_path, *REWRITE).returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["model.dfa.onnx", "model.onnx", "plan.json"], "leftovers of killed runs"
