"""The reference's import line, on machines without pyATS: ``from pyats.async_.synchronize import Lockable``."""

from coheld import Lockable

__all__ = ["Lockable"]
