"""Builds the CPU kernels beside the package, where there is a C++ compiler; see pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("src/rorqual/ops/native")
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-pthread"]

setup(
    ext_modules=[
        Extension(
            "rorqual.ops.native.kernels",
            sources=[str(path) for path in sorted(NATIVE.glob("*.cpp"))],
            depends=[str(path) for path in sorted((*NATIVE.glob("*.h"), *NATIVE.glob("*.inl")))],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,  # without it all runs on torch
        )
    ]
)
