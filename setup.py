"""Builds the C passes of the CPU forms, where a compiler is; all else stands in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "model.kernels.cpu._passes",
            [f"model/kernels/cpu/{name}.c" for name in ("passes", "lightning", "attention")],
            depends=[f"model/kernels/cpu/{name}.h" for name in ("rows", "products")],
            # neither lets sums be reordered or NaN be forgotten
            extra_compile_args=["-O3", "-g0", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"],
            extra_link_args=["-fopenmp", "-lm"],
            # without a compiler, or with one that takes no such flags, torch's forms serve
            optional=True,
        )
    ]
)
