"""Records what a loop feeds a model, for `dfa-rewrite search --trajectory`.

Around any loop over `InferenceSession.run`:

    from record_trajectory import Recorder

    session = Recorder(onnxruntime.InferenceSession("model.onnx"))
    ...                                    # the loop as it is; session.run(…) works as before
    session.save("traj.npz")

Around a diffusers pipeline, whose transformer the model was exported from; `names` says which argument became which input where they differ:

    with record(pipe.transformer) as recorder:
        pipe(class_labels=[207, 360], num_inference_steps=20)
    recorder.save("traj.npz", names={"encoder_hidden_states": "prompt"})

Needs numpy only. Every input becomes an array with a leading axis of steps, or one without where it never changed. One generation per file.
"""

import contextlib

import numpy as np


class Recorder:
    """Stands in for an `InferenceSession`, or for nothing, and keeps a copy of every feed."""

    def __init__(self, session=None):
        self.session = session
        self.feeds = []

    def __getattr__(self, name):
        return getattr(self.session, name)

    def run(self, outputs, feed, *arguments, **options):
        self.add(feed)
        return self.session.run(outputs, feed, *arguments, **options)

    def add(self, feed):
        """Keeps one step's inputs by name: arrays, or anything that `numpy.asarray` takes. Request inputs of a rewritten model are left out."""
        self.feeds.append({name: _array(value) for name, value in feed.items() if not name.startswith("dfa_")})

    def save(self, path, names=None):
        """Writes the recording. `names`: recorded name → the graph's input.

        Raises ValueError if nothing was recorded, or if steps differ in their inputs or shapes: then it was more than one generation.
        """
        if not self.feeds:
            raise ValueError("nothing was recorded: expected at least one step")
        arrays = {}
        for name, first in self.feeds[0].items():
            steps = [feed.get(name) for feed in self.feeds]
            odd = next((i for i, a in enumerate(steps) if a is None or a.shape != first.shape or a.dtype != first.dtype), None)
            if odd is not None:
                found = "is missing" if steps[odd] is None else f"is {steps[odd].dtype} {steps[odd].shape}"
                raise ValueError(f"`{name}` is {first.dtype} {first.shape} at step 0 and {found} at step {odd}: record one generation at a time")
            same = len(steps) > 1 and all(np.array_equal(first, a) for a in steps[1:])
            arrays[(names or {}).get(name, name)] = first if same else np.stack(steps)
        np.savez(path, **arrays)


@contextlib.contextmanager
def record(module):
    """Records the tensor arguments of every call of a PyTorch module. Yields the recorder."""
    recorder = Recorder()
    forward = module.forward

    def hooked(*arguments, **named):
        import inspect

        bound = inspect.signature(forward).bind(*arguments, **named).arguments
        flat = {**bound, **bound.pop("kwargs", {})}
        recorder.add({name: value for name, value in flat.items() if hasattr(value, "detach")})
        return forward(*arguments, **named)

    module.forward = hooked
    try:
        yield recorder
    finally:
        module.forward = forward


def _array(value):
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # NumPy has no bfloat16.
        value = value.float() if "bfloat16" in str(value.dtype) else value
        value = value.numpy()
    return np.array(value)
