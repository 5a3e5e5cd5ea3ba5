"""Every error this package raises on purpose.

    AutoGPTQError
    ├── ConfigError              a setting that cannot work                    (ValueError)
    ├── ExamplesError            calibration examples of the wrong form        (ValueError)
    │   └── ExampleKeyError      an example lacks a key                        (KeyError)
    ├── CheckpointError          a file or tensor is damaged or does not fit   (ValueError)
    │   └── MissingFileError     no file under any of the names tried          (FileNotFoundError)
    ├── UnsupportedModelError    nothing is known about this kind of model     (TypeError)
    ├── ModuleShapeError         a linear's shape cannot be packed             (ValueError)
    ├── NumericsError            NaN or infinity where numbers were expected   (ArithmeticError)
    │   └── FactorizationError   a Hessian without a Cholesky factor           (ArithmeticError)
    ├── StorageError             the disk is full                              (OSError)
    ├── QuantizedStateError      quantizing twice, saving what is not packed   (OSError)
    ├── MissingLibraryError      a feature's optional library is absent        (ImportError)
    ├── DerivedWeightError       writing into a quantized layer's weight       (NotImplementedError)
    └── RetiredError             a part of AutoGPTQ that is gone               (NotImplementedError)

Each also is the built-in class that AutoGPTQ raised in its place, so an old ``except ValueError``
keeps working.  A message says what is wrong, with the numbers, and what to do.
"""

from __future__ import annotations


class AutoGPTQError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(AutoGPTQError, ValueError):
    """A quantization setting that cannot work."""


class ExamplesError(AutoGPTQError, ValueError):
    """Calibration examples of a form that cannot be used."""


class ExampleKeyError(ExamplesError, KeyError):
    """A calibration example lacks a key that it must have."""

    def __str__(self) -> str:  # KeyError would print the message quoted, as if it were a key
        return str(self.args[0])


class CheckpointError(AutoGPTQError, ValueError):
    """A checkpoint whose files or tensors are damaged or do not fit the model."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """No file was found under any of the names that were tried."""


class UnsupportedModelError(AutoGPTQError, TypeError):
    """A model type without a row in the architecture table."""


class ModuleShapeError(AutoGPTQError, ValueError):
    """A linear layer whose shape the packed format cannot hold."""


class NumericsError(AutoGPTQError, ArithmeticError):
    """NaN or infinity in weights, activations or a Hessian."""


class FactorizationError(NumericsError):
    """A Hessian that is not positive definite at any damping."""


class StorageError(AutoGPTQError, OSError):
    """A file could not be written for lack of room."""


class QuantizedStateError(AutoGPTQError, OSError):
    """An operation that the model's state (quantized or not) forbids."""


class MissingLibraryError(AutoGPTQError, ImportError):
    """A library that only this feature needs is not installed."""


class DerivedWeightError(AutoGPTQError, NotImplementedError):
    """An attempt to write into the derived weight of a quantized layer."""


class RetiredError(AutoGPTQError, NotImplementedError):
    """A part of AutoGPTQ whose name is kept and that cannot be used any more."""
