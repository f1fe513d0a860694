"""The optional compiled parts: transform of elements, copying of memory. Everything else is in pyproject.toml.

`optional=True`: where no compiler is at hand the package installs without them, and numpy does the same work more
slowly.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "castore.codec._kernel",
            sources=["castore/codec/_kernel.c"],
            extra_compile_args=["-O3"],
            py_limited_api=True,
            optional=True,
        ),
        Extension(
            "castore.tensors._memory",
            sources=["castore/tensors/_memory.c"],
            extra_compile_args=["-O3", "-pthread"],
            extra_link_args=["-pthread"],
            py_limited_api=True,
            optional=True,
        ),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
