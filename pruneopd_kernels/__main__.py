"""`python -m pruneopd_kernels`: what `impl="auto"` takes here; what is not usable, why, and what would make it so."""

import platform

from . import __version__


def main() -> None:
    print(f"pruneopd_kernels {__version__}, Python {platform.python_version()}, {platform.machine()}")
    for name, state in [*_torch_rows(), ("host", _host_state())]:
        print(f"  {name:<10} {state}")


def _torch_rows() -> list[tuple[str, str]]:
    try:
        import torch
    except ImportError as error:
        return [("operators", f"not usable: {error}; pip install 'torch>=2.11' makes them so")]
    from .dispatch import cpp, cuda
    from .dispatch.implementations import AUTO, WHY_NOT

    def state(impl: str) -> str:
        why = WHY_NOT[impl]
        if why is not None:
            return f"not usable: {why}"
        if impl == "cpp":
            chosen, others = cpp.instruction_set(), cpp.instruction_sets()
            return f"usable, with {chosen} (of {', '.join(others)})"
        if impl == "cuda":
            major, minor = cuda.toolkit()
            return f"usable, built with CUDA {major}.{minor} for {', '.join(cuda.architectures())}"
        if impl == "triton":
            import triton

            return f"usable, with triton {triton.__version__}"
        return "usable"

    places = {"cpu": "the CPU", "cuda": "a GPU"}
    auto = " and ".join(f"{AUTO[device][0]} on {place}" for device, place in places.items())
    return [("torch", torch.__version__), ("auto", f"takes {auto}"), *((impl, state(impl)) for impl in WHY_NOT)]


def _host_state() -> str:
    try:
        from . import host
    except ImportError as error:
        return f"not usable: {error}; pip install numpy makes it so"
    return "usable" if host.WHY_NOT is None else f"not usable: {host.WHY_NOT}"


if __name__ == "__main__":
    main()
