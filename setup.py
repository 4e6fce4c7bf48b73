"""The native core, which is optional: where no C compiler is, the same runs on numpy. All else is in pyproject.toml."""

from setuptools import Extension, setup

# Vectors need -O3 here. Predictions must come out alike everywhere: no contraction, and never -ffast-math.
FLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Functions compiled for several machines stay visible whatever was said; nobody else may answer to their names.
LINKING = ["-Wl,-Bsymbolic"]
FOLDER = "gpumove/format/native"

setup(
    exclude_package_data={"gpumove.format": ["native/*"]},  # only to build from
    ext_modules=[
        Extension(
            "gpumove.format._native",
            [f"{FOLDER}/{name}.c" for name in ("formulas", "lanes", "module", "planes")],
            depends=[f"{FOLDER}/{name}.h" for name in ("width", "words")],
            extra_compile_args=FLAGS,
            extra_link_args=LINKING,
            optional=True,
        )
    ],
)
