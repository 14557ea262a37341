"""Records what a loop feeds a model, for `dfa-rewrite search --trajectory`."""

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


class Recorder:
    """Stands in for an `InferenceSession`, or for nothing, and keeps a copy of every feed."""

    def __init__(self, session: Any = None) -> None:
        self.session = session
        self.feeds: list[dict[str, np.ndarray[Any, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run(self, outputs: Any, feed: Mapping[str, Any], *arguments: Any, **options: Any) -> Any:
        """The session's `run`, recorded."""
        self.add(feed)
        return self.session.run(outputs, feed, *arguments, **options)

    def add(self, feed: Mapping[str, Any]) -> None:
        """Keeps one step's inputs by name: arrays, or anything that `numpy.asarray` takes. Request inputs of a rewritten model are left out."""
        self.feeds.append({name: _array(value) for name, value in feed.items() if not name.startswith("dfa_")})

    def save(self, path: str | os.PathLike[str], names: Mapping[str, str] | None = None) -> None:
        """Writes the recording as .npz: per input an array with a leading axis of steps (of runs, where guidance takes two per step: `--cfg separate`), or one without where it never changed.

        `names`: recorded name → the graph's input, where they differ.

        Raises ValueError if nothing was recorded, or if steps differ in their inputs or shapes: then it was more than one generation.
        """
        if not self.feeds:
            raise ValueError("nothing was recorded: expected at least one step")
        arrays = {}
        for name, first in self.feeds[0].items():
            steps = []
            for i, feed in enumerate(self.feeds):
                step = feed.get(name)
                if step is None or step.shape != first.shape or step.dtype != first.dtype:
                    found = "is missing" if step is None else f"is {step.dtype} {step.shape}"
                    raise ValueError(f"`{name}` is {first.dtype} {first.shape} at step 0 and {found} at step {i}: record one generation at a time")
                steps.append(step)
            same = len(steps) > 1 and all(np.array_equal(first, a) for a in steps[1:])
            arrays[(names or {}).get(name, name)] = first if same else np.stack(steps)
        np.savez(path, **arrays)  # type: ignore[arg-type]  # an input could be named `allow_pickle`


@contextlib.contextmanager
def record_trajectory(target: Any) -> Iterator[Recorder]:
    """Records one generation: the tensor arguments of every call of a PyTorch module, or the feeds of a loop over `InferenceSession.run`.

    A module, such as the transformer of a diffusers pipeline that the model was exported from, is called as before:

        with ditfastattn.record_trajectory(pipe.transformer) as recorder:
            pipe(class_labels=[207, 360], num_inference_steps=20)
        recorder.save("traj.npz", names={"encoder_hidden_states": "prompt"})

    For a session the recorder stands in:

        with ditfastattn.record_trajectory(session) as recorder:
            for t in timesteps:
                noise = recorder.run(None, {...})
        recorder.save("traj.npz")

    Raises TypeError for what is neither.
    """
    if hasattr(target, "run"):
        yield Recorder(target)
        return
    if not hasattr(target, "forward"):
        raise TypeError(f"cannot record a {type(target).__name__}: expected a PyTorch module or an onnxruntime.InferenceSession")
    recorder = Recorder()
    forward = target.forward

    def hooked(*arguments: Any, **named: Any) -> Any:
        bound = inspect.signature(forward).bind(*arguments, **named).arguments
        recorder.add(dict(_tensors(bound)))
        return forward(*arguments, **named)

    target.forward = hooked
    try:
        yield recorder
    finally:
        target.forward = forward


def _tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    # A module's `**kwargs`, and diffusers' `added_cond_kwargs`, are inputs one by one.
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif hasattr(value, "detach"):
            yield name, value


def _array(value: Any) -> "np.ndarray[Any, Any]":
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # NumPy has no bfloat16.
        value = value.float() if "bfloat16" in str(value.dtype) else value
        value = value.numpy()
    return np.array(value)
