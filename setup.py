"""The C extension; everything else about the build is in pyproject.toml.

COHELD_CFLAGS adds compiler and linker flags: the sanitizer build of .ci/run uses it.
"""

import os
from glob import glob

from setuptools import Extension, setup

extra = os.environ.get("COHELD_CFLAGS", "").split()

setup(
    ext_modules=[
        Extension(
            "coheld._native",
            ["src/coheld/_native.c"],
            depends=sorted(glob("src/coheld/*.h")),
            extra_compile_args=["-std=gnu11", "-O2", "-fvisibility=hidden", "-Wall", "-Wextra", *extra],
            extra_link_args=["-pthread", *extra],
            optional=True,  # without a compiler, or elsewhere than on Linux, the portable backend serves
        )
    ]
)
