"""A rewritten model in place of the transformer of a diffusers pipeline. Needs torch, diffusers and ONNX Runtime.

    pipe.transformer = ORTTransformer("transformer.dfa.onnx", config=pipe.transformer)

for `DiTPipeline` and `PixArtSigmaPipeline`; everything else stays as it is.
"""

import itertools
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from ._session import session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

# In which order the pipeline of each class puts the halves of guidance into the batch.
_ORDERS = {"DiTTransformer2DModel": "cond-first", "PixArtTransformer2DModel": "uncond-first"}

# What NumPy can hold of ONNX Runtime's types: there is no bfloat16.
_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}

# Shared by all transformers of a process: two of them may use one session. 0 would mean nobody.
_requests = itertools.count(1)


@dataclass
class _Generation:
    """One denoising, as far as its calls tell."""

    request: int
    conditioning: dict[str, Any]
    timestep: float
    steps: int = 0


class ORTTransformer:
    """Computes what a pipeline's transformer computes, with ONNX Runtime, under the plan in the model.

    A generation ends where the timestep rises or the conditioning is another object; each has a request id of its own, so pipelines in
    several threads may share one transformer. Calls under a pipeline that makes its conditioning anew at every step are right, and dense.
    """

    def __init__(
        self,
        model: "str | os.PathLike[str] | InferenceSession",
        *,
        config: "torch.nn.Module | Mapping[str, Any] | str | os.PathLike[str]",
        names: Mapping[str, str | None] | None = None,
        cfg: str | None = None,
        **options: Any,
    ) -> None:
        """`model`: a file, rewritten or not, or a session of one. `config`: the transformer that is replaced (only its
        settings are read), or its config, or the file or folder that holds it (`config.json`). `names`: the pipeline's argument → the graph's input where they differ; None leaves an argument out, on purpose.
        `cfg`: the order of the halves, `cond-first` or `uncond-first`, for classes other than DiT's and PixArt's. `options`: those of
        `ditfastattn.session`.

        Raises ValueError if the plan expects guidance otherwise than the pipeline feeds it, for a model with explicit state, and for a
        graph without the latents or with inputs that PyTorch cannot feed.
        """
        self.session = session(model, **options) if isinstance(model, (str, os.PathLike)) else model
        self.config = FrozenDict(_read_config(config))
        self._names = dict(names or {})
        self._inputs = {i.name: i.type for i in self.session.get_inputs() if not i.name.startswith("dfa_")}
        self._output = self.session.get_outputs()[0].name
        known = {i.name for i in [*self.session.get_inputs(), *self.session.get_overridable_initializers()]}
        self._takes_requests = "dfa_request_id" in known
        self._local = threading.local()

        metadata = self.session.get_modelmeta().custom_metadata_map
        if metadata.get("ditfastattn.state") == "io":
            raise ValueError("the model has explicit state, which a pipeline does not carry: expected one rewritten without `--state io`")
        plan = json.loads(metadata.get("ditfastattn.plan", '{"steps": []}'))
        self._steps = len(plan["steps"])
        self._copies_halves = any("asc" in action for row in plan["steps"] for action in row)
        self._check_graph()
        self._check_guidance(plan.get("cfg", "none"), cfg)

    @property
    def dtype(self) -> torch.dtype:
        """What the graph takes latents in."""
        return _TYPES[self._inputs[self._name("hidden_states")]]

    @property
    def device(self) -> torch.device:
        """Where tensors are handed to ONNX Runtime. Results come back on the device of the latents."""
        return torch.device("cpu")

    def new_generation(self) -> None:
        """Makes this thread's next call the first of a generation. Needed only where one is begun in the middle, right where another with
        the same conditioning was abandoned."""
        self._local.generation = None

    def __call__(self, hidden_states: torch.Tensor, *, return_dict: bool = True, **arguments: Any) -> Any:
        """The transformer's prediction for one step, `[rows, channels, height, width]`, in the dtype and on the device of `hidden_states`.

        Takes the transformer's tensor arguments by name; those in `added_cond_kwargs` count as arguments. Returns a
        `Transformer2DModelOutput`, or a tuple without `return_dict`.

        Raises ValueError for an argument that the graph does not have, an input that is not given, a value that does not fit the input's
        type, and rows that are no guidance pairs where the plan computes only one half of them.
        """
        given = dict(_tensors(arguments))
        timestep = given.get("timestep")
        if timestep is None:
            raise ValueError("no `timestep` was given: expected the step's timestep, as the pipeline passes it")
        self._check_pairs(hidden_states)
        feed = self._feed({"hidden_states": hidden_states, **given})
        if self._takes_requests:
            conditioning = {name: value for name, value in given.items() if name != "timestep"}
            feed |= self._request(float(timestep.flatten()[0]), conditioning)
        sample = torch.from_numpy(self.session.run([self._output], feed)[0])
        sample = sample.to(hidden_states.device, hidden_states.dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _name(self, argument: str) -> str | None:
        return self._names.get(argument, argument)

    def _feed(self, given: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        feed = {}
        for argument, value in given.items():
            name = self._name(argument)
            if name is None:
                continue
            if name not in self._inputs:
                raise ValueError(
                    f"the pipeline passes `{argument}`, and the graph has no input `{name}` (it has {', '.join(self._inputs)}): "
                    f'name the input, names={{"{argument}": "…"}}, or leave the argument out, names={{"{argument}": None}}'
                )
            feed[name] = _array(argument, value, _TYPES[self._inputs[name]])
        missing = [name for name in self._inputs if name not in feed]
        if missing:
            raise ValueError(f"the graph's input `{missing[0]}` is not given: expected one of {', '.join(given)} to be it; name it with names={{…}}")
        return feed

    def _request(self, timestep: float, conditioning: dict[str, Any]) -> dict[str, Any]:
        last: _Generation | None = getattr(self._local, "generation", None)
        # The objects, not their values: two users may want the same picture. The generation holds them, so none can take another's place.
        goes_on = (
            last is not None
            and timestep <= last.timestep
            and conditioning.keys() == last.conditioning.keys()
            and all(value is last.conditioning[name] for name, value in conditioning.items())
        )
        generation = last if last is not None and goes_on else _Generation(next(_requests), conditioning, timestep)
        generation.timestep, generation.steps = timestep, generation.steps + 1
        end = generation.steps == self._steps
        self._local.generation = None if end else generation
        return {
            "dfa_request_id": np.array(generation.request, np.int64),
            "dfa_start": np.array(generation.steps == 1),
            "dfa_end": np.array(end),
        }

    def _check_graph(self) -> None:
        if self._name("hidden_states") not in self._inputs:
            raise ValueError(
                f'the graph has no input `{self._name("hidden_states")}` (it has {", ".join(self._inputs)}): name the one for the latents, '
                'names={"hidden_states": "…"}'
            )
        for name, kind in self._inputs.items():
            if kind not in _TYPES:
                raise ValueError(f"the graph's input `{name}` is {kind}: expected one of {', '.join(_TYPES)}; export the model in float16 or float32")

    def _check_guidance(self, planned: str, cfg: str | None) -> None:
        if planned == "none":
            return
        order = cfg or _ORDERS.get(self.config.get("_class_name"))
        if order is None:
            found = self.config.get("_class_name")
            raise ValueError(
                f"the config's `_class_name` is {found!r}: expected one of {', '.join(_ORDERS)}; give the transformer itself or its config.json, "
                "or say cfg='cond-first' or 'uncond-first'"
            )
        if planned != order:
            raise ValueError(f"the plan has cfg `{planned}` and the pipeline feeds `{order}`: rewrite the model with a plan whose cfg is `{order}`")

    def _check_pairs(self, latents: torch.Tensor) -> None:
        rows = latents.shape[0]
        if self._copies_halves and rows % 2 == 0 and not torch.equal(latents[: rows // 2], latents[rows // 2 :]):
            raise ValueError(
                f"the plan copies one half of guidance to the other, and the {rows} rows of latents are no such pairs: "
                "run with guidance (guidance_scale above 1), or rewrite the model with a plan without `asc`"
            )


def _tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor):
            yield name, value
        elif value is not None:
            raise ValueError(f"`{name}` is a {type(value).__name__}: expected a tensor, a dict of tensors, or None")


def _array(argument: str, value: torch.Tensor, dtype: torch.dtype) -> "np.ndarray[Any, Any]":
    fed = value.detach().cpu().to(dtype)
    if value.is_floating_point() and not dtype.is_floating_point and not torch.equal(fed.to(value.dtype), value.detach().cpu()):
        raise ValueError(
            f"`{argument}` is {value.dtype} with values that the graph's {dtype} cannot hold: export the model with a float input, "
            "or use a scheduler with whole timesteps"
        )
    return np.ascontiguousarray(fed.numpy())


def _read_config(config: "torch.nn.Module | Mapping[str, Any] | str | os.PathLike[str]") -> Mapping[str, Any]:
    if isinstance(config, torch.nn.Module):
        # A model's config knows its class only once it is written to a file.
        return {**config.config, "_class_name": type(config).__name__}
    if isinstance(config, Mapping):
        return config
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no config at {path}: expected the transformer's config.json or the folder that holds it")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
