"""Kernels as they are written: Triton reads their source, and the checks of annotations would stand before it."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import mhc_torch.kernels

for path in Path(mhc_torch.kernels.__file__).parent.glob("triton_*.py"):
    specification = spec_from_file_location(f"mhc_torch.kernels.{path.stem}", path)
    module = module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    setattr(mhc_torch.kernels, path.stem, module)
