"""What is built and packed: the sdist, the wheel, the choice of targets, and extensions that load without a driver."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from build_tools.compiler import Builder, CompileError, Step
from build_tools.extensions import make_plan
from build_tools.nvshmem import Nvshmem, find_nvshmem
from build_tools.project import requirements
from build_tools.toolkit import Arch, Nvcc, host_compiler, nvcc_host_compiler, parse_archs, select_archs

ROOT = Path(__file__).resolve().parent.parent


def make_nvcc(folder: Path, release: str, codes: str) -> Nvcc:
    """Writes a program that answers the two questions the build asks of nvcc."""
    path = folder / "nvcc"
    listing = "\\n".join(f"sm_{code}" for code in codes.split())
    path.write_text(f'#!/bin/sh\ncase "$1" in --version) echo "release {release},";; *) printf "{listing}\\n";; esac\n')
    path.chmod(0o755)
    return Nvcc(str(path))


def test_archs_are_read_with_any_separator():
    assert parse_archs("80+PTX;90a, 100f") == [Arch(80, ptx=True), Arch(90, "a"), Arch(100, "f")]
    for text in ("", "sm_90", "90x", "90+ptx"):
        with pytest.raises(ValueError, match="is no target"):
            parse_archs(text)


def test_gencode_leaves_ptx_out_of_relocatable_code():
    arch = Arch(80, ptx=True)
    assert arch.gencode(ptx=False) == ["-gencode=arch=compute_80,code=sm_80"]
    assert arch.gencode(ptx=True)[1:] == ["-gencode=arch=compute_80,code=compute_80"]


@pytest.mark.parametrize(
    ("release", "codes", "expected"),
    [
        ("13.0", "75 80 86 90 100 120", ["80", "90a", "100f"]),
        ("12.8", "70 80 90 100", ["80", "90a"]),
        ("12.4", "70 80 90", ["80", "90a"]),
        ("11.8", "70 80 90", ["80"]),
    ],
)
def test_default_archs_are_those_the_toolkit_knows(tmp_path: Path, release: str, codes: str, expected: list[str]):
    assert [arch.name for arch in select_archs({}, make_nvcc(tmp_path, release, codes))] == expected


def test_unknown_arch_is_refused_with_what_there_is(tmp_path: Path):
    nvcc = make_nvcc(tmp_path, "12.4", "80 90")
    with pytest.raises(ValueError, match=r"nvcc 12\.4 does not know 100f; it compiles for 80, 90"):
        select_archs({"MOE_EP_CUDA_ARCHS": "90a 100f"}, nvcc)


def test_compilers_follow_the_environment():
    assert host_compiler({}) == ["g++"]
    assert host_compiler({"CC": "gcc-12"}) == ["g++-12"]
    assert host_compiler({"CC": "ccache /usr/bin/clang"}) == ["ccache", "/usr/bin/clang++"]
    assert host_compiler({"CC": "gcc", "CXX": "clang++-17 -v"}) == ["clang++-17", "-v"]
    assert nvcc_host_compiler({}) == []
    assert nvcc_host_compiler({"CC": "gcc-12"}) == ["-ccbin", "g++-12"]
    assert nvcc_host_compiler({"CXX": "g++", "NVCC_CCBIN": "g++-11"}) == ["-ccbin", "g++-11"]


def test_plan_says_what_is_left_out_and_refuses_what_cannot_be(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MOE_EP_WITH_NVSHMEM", raising=False)
    assert "MOE_EP_WITH_CUDA=0" in make_plan({"MOE_EP_WITH_CUDA": "0"}).summary()
    with pytest.raises(ValueError, match="MOE_EP_WITH_CUDA='yes': must be one of 0, 1, auto"):
        make_plan({"MOE_EP_WITH_CUDA": "yes"})
    with pytest.raises(ValueError, match="MOE_EP_WITH_NVSHMEM=1 asks for CUDA sources"):
        make_plan({"MOE_EP_WITH_CUDA": "0", "MOE_EP_WITH_NVSHMEM": "1"})


@pytest.mark.parametrize("asked", ["1", "cu13"])
def test_nvshmem_that_is_asked_for_has_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str):
    monkeypatch.setenv("MOE_EP_WITH_NVSHMEM", asked)
    monkeypatch.setattr("build_tools.extensions.find_nvshmem", lambda _: None)
    monkeypatch.setattr("build_tools.extensions.find_nvcc", lambda _: make_nvcc(tmp_path, "13.0", "80 90"))
    with pytest.raises(ValueError, match=f"MOE_EP_WITH_NVSHMEM={asked}: NVSHMEM not found: set MOE_EP_NVSHMEM_DIR"):
        make_plan({"MOE_EP_WITH_NVSHMEM": asked})
    # Where nobody asks, the plan goes on without it.
    monkeypatch.delenv("MOE_EP_WITH_NVSHMEM")
    assert "moe_ep._C_internode" in make_plan({}).summary()


def test_the_build_environment_gets_the_wheel_that_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    from build_tools import backend

    for hook in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        monkeypatch.delenv("MOE_EP_WITH_NVSHMEM", raising=False)
        assert not any("nvshmem" in name for name in hook())
        monkeypatch.setenv("MOE_EP_WITH_NVSHMEM", "cu13")
        assert [name for name in hook() if "nvshmem" in name] == ["nvidia-nvshmem-cu13==3.4.5"]


def test_nvshmem_is_found_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "nvidia" / "nvshmem"
    for name in ("include/nvshmem.h", "lib/libnvshmem_device.a"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    with pytest.raises(ValueError, match=r"lacks lib/libnvshmem_host\.so\.3"):
        find_nvshmem({"MOE_EP_NVSHMEM_DIR": str(root)})
    (root / "lib/libnvshmem_host.so.3").touch()
    assert find_nvshmem({"MOE_EP_NVSHMEM_DIR": str(root)}) == Nvshmem(root)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_nvshmem({}) == Nvshmem(root)


def test_requirements_of_an_extra_hold_the_inner_extras_and_the_build(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOE_EP_WITH_NVSHMEM", "cu13")
    found = " ".join(requirements(["test"]))
    for name in ("pybind11", "torch", "matplotlib", "pytest", "nvidia-nvshmem-cu13=="):
        assert name in found
    assert "moe_ep[" not in found
    monkeypatch.setenv("MOE_EP_WITH_NVSHMEM", "cu11")
    with pytest.raises(ValueError, match="MOE_EP_WITH_NVSHMEM='cu11': must be cu12, cu13, 0 or 1"):
        requirements([])


def test_builder_compiles_again_only_what_changed(tmp_path: Path):
    header, source, runs = tmp_path / "one.h", tmp_path / "one.cpp", tmp_path / "runs"
    header.write_text("#define ANSWER 1\n")
    source.write_text('#include "one.h"\nint answer() { return ANSWER; }\n')
    compiler = tmp_path / "count"
    compiler.write_text(f'#!/bin/sh\necho run >> "{runs}"\nexec {" ".join(host_compiler(os.environ))} "$@"\n')
    compiler.chmod(0o755)

    def compile_once(*flags: str) -> int:
        step = Step("one.o", [str(compiler), *flags, "-c"], [source], "1.0", "-MMD")
        Builder(tmp_path / "objects", root=tmp_path, aliases={}, jobs=2).run([step])
        return len(runs.read_text().splitlines())

    assert [compile_once(), compile_once(), compile_once("-O1"), compile_once()] == [1, 1, 2, 2]
    source.touch()
    assert compile_once() == 2
    source.write_text('#include "one.h"\nint answer() { return ANSWER + 1; }\n')
    assert compile_once() == 3
    source.write_text("int answer() {\n")
    with pytest.raises(CompileError, match="error"):
        compile_once()


@pytest.mark.parametrize("name", ["moe_ep._C", "moe_ep._C_internode"])
def test_extension_loads_without_a_driver(name: str):
    if importlib.util.find_spec(name) is None:
        pytest.skip(
            f"{name} is not built here: it needs {'NVSHMEM' if 'internode' in name else 'an installed package'}"
        )
    # No device is visible and no driver found: loading and asking for the build must not want either.
    script = f"import {name} as module; print(module.build_info())"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{'cuda'" if name == "moe_ep._C" else "{'nvshmem_built'")


def test_build_info_is_what_was_asked_for():
    core = pytest.importorskip(
        "moe_ep._C", reason="the extension moe_ep._C is not built: run `make test` or pip install"
    )
    info = core.build_info()
    assert info["cuda"] == bool(info["cuda_archs"]) == bool(info["cuda_version"])
    assert info["cuda"] or "CUDA" in info["not_built"]
    assert info["nvshmem_version"] or "moe_ep._C_internode" in info["not_built"]


def test_nvshmem_runtime_refuses_before_it_touches_a_device():
    internode = pytest.importorskip("moe_ep._C_internode", reason="moe_ep._C_internode is not built: it needs NVSHMEM")
    with pytest.raises(ValueError, match="unique_id has 3 bytes: must be the 128 bytes"):
        internode.NvshmemRuntime(b"abc", rank=0, num_ranks=1)
    with pytest.raises(ValueError, match="rank=2: must be 0 to 1"):
        internode.NvshmemRuntime(bytes(128), rank=2, num_ranks=2)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies what git would ship, links as links."""
    target = tmp_path_factory.mktemp("tree") / "moe_ep"
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, target, symlinks=True, ignore=ignored)
    return target


def run_setup(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Packing is looked at here, not compiling: a linker that is no linker makes an empty extension at once.
    fake = tree.parent / "g++"
    fake.write_text(
        '#!/bin/sh\nfor last; do case "$previous" in -o|-MF) echo x: > "$last";; esac; previous=$last; done\n'
    )
    fake.chmod(0o755)
    environment = {**os.environ, "MOE_EP_WITH_CUDA": "0", "MOE_EP_WITH_NVSHMEM": "0", "CXX": str(fake)}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments], cwd=tree, env=environment, capture_output=True, text=True
    )


def test_sdist_and_wheel_hold_what_is_behind_the_links(tree: Path):
    done = run_setup(tree, "sdist")
    assert done.returncode == 0, done.stderr
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
        archive.extractall(tree.parent / "unpacked")
    for name in ("moe_ep/layers/router.py", "moe_ep/integrations/__init__.py", "csrc/kernels/plan.cu", "setup.py"):
        assert members[name].isreg(), name
    assert "build_tools/backend.py" in members
    # The wheel is made from the sdist, where folders stand in the links' place.
    (unpacked,) = (tree.parent / "unpacked").iterdir()
    done = run_setup(unpacked, "bdist_wheel")
    assert done.returncode == 0, done.stderr
    assert "moe_ep: built moe_ep._C; not built: the CUDA kernels (MOE_EP_WITH_CUDA=0" in done.stderr
    (wheel,) = (unpacked / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"moe_ep/layers/router.py", "moe_ep/integrations/__init__.py", "moe_ep/py.typed", "moe_ep/_C.pyi"} <= names
    assert any(name.startswith("moe_ep/_C.") and name.endswith(".so") for name in names)
    assert not {name.partition("/")[0] for name in names} & {"layers", "integrations", "tests", "csrc", "build_tools"}


def test_lost_links_stop_the_build_with_one_sentence(tree: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(tree, copy, symlinks=True)
    (copy / "moe_ep" / "layers").unlink()
    (copy / "moe_ep" / "layers").write_text("../layers")
    done = run_setup(copy, "--version")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "moe_ep/layers must be a folder or a link to ../layers, but was lost in copying: clone with links on."
    ]
