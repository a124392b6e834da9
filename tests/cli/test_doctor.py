import importlib.metadata
import json
import subprocess
import sys
import sysconfig
import types

import pytest
import torch

import moe_ep
from moe_ep.cli import doctor, machine
from moe_ep.cli.findings import Finding
from moe_ep.cli.main import main
from moe_ep.cli.tables import markdown_table, plain_table

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_report_names_what_matters(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in (
        "python",
        "torch",
        "gloo",
        "nccl",
        "mpi",
        "moe_ep._C",
        "moe_ep._C_internode",
        "nvcc",
        "nvshmem",
        "auto",
    ):
        assert f"{name} " in out
    assert "nothing that is installed is broken" in out


def test_json_holds_every_finding(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["exit_code"] == 0
    assert {finding["part"] for finding in report["findings"]} == {
        "python", "torch", "gpu", "extensions", "tools", "packages", "backend", "notes"
    }  # fmt: skip
    assert all(finding["state"] in ("ok", "absent", "broken", "note") for finding in report["findings"])


def all_absent(findings, *names):
    """Check that what is absent says what it costs and what mends it, and that all of ``names`` are absent."""
    absent = [finding for finding in findings if finding.state == "absent"]
    assert {finding.name for finding in absent} >= set(names)
    for finding in absent:
        assert finding.cost, finding
        assert finding.remedy, finding


def test_every_absence_says_what_it_costs_and_what_mends_it():
    all_absent(doctor.examine())


def test_the_same_on_a_machine_that_has_nothing(tmp_path, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    for backend in ("gloo", "nccl", "mpi"):
        monkeypatch.setattr(machine.dist, f"is_{backend}_available", lambda: False)
    monkeypatch.setattr(machine, "driver_version", lambda: None)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(moe_ep, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.delenv("MOE_EP_NVSHMEM_DIR", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    extensions = ("moe_ep._C", "moe_ep._C_internode")
    all_absent(doctor.examine(), "gloo", "nccl", "mpi", "GPUs", "nvcc", "nvshmem", *extensions, *doctor.PACKAGES)


def test_the_same_for_a_torch_without_distributed(monkeypatch):
    monkeypatch.setattr(machine.dist, "is_available", lambda: False)
    all_absent(machine.examine_torch(), "torch.distributed")


def test_another_torch_is_a_command_that_pip_does_not_skip(monkeypatch):
    monkeypatch.setattr(machine.dist, "is_nccl_available", lambda: False)
    command = "pip install torch --force-reinstall --index-url https://download.pytorch.org/whl/cu130"
    assert by_name(machine.examine_torch())["nccl"].remedy.endswith(command)


@pytest.mark.parametrize("seconds", ["abc", "0", "-1", "nan", ""])
def test_a_timeout_that_every_buffer_refuses_is_broken(monkeypatch, capsys, seconds):
    monkeypatch.setenv("MOE_EP_TIMEOUT_S", seconds)
    finding = by_name(doctor.examine_timeouts())["timeout"]
    assert finding.state == "broken"
    assert f"MOE_EP_TIMEOUT_S={seconds} must be a positive number" in finding.found
    assert "such as 600" in finding.remedy
    assert main(["doctor"]) == 1
    assert "broken: timeout" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "text"), [("7.5", "7.5 s (set by MOE_EP_TIMEOUT_S)"), (None, "600 s (timeout_s=")])
def test_the_timeout_that_rules_is_shown(monkeypatch, seconds, text):
    monkeypatch.delenv("MOE_EP_TIMEOUT_S", raising=False)
    if seconds is not None:
        monkeypatch.setenv("MOE_EP_TIMEOUT_S", seconds)
    finding = by_name(doctor.examine_timeouts())["timeout"]
    assert finding.state == "note"
    assert f"waits for its peers for {text}" in finding.found


def test_only_what_is_broken_fails():
    states = [Finding(part="p", name="n", state=state, found="") for state in ("ok", "absent", "note", "broken")]
    assert doctor.exit_code(states[:3]) == 0
    assert doctor.exit_code(states) == 1


def test_an_examination_that_fails_is_reported_beside_the_others(monkeypatch):
    def examine_packages():
        raise OSError("disk gone")

    monkeypatch.setattr(doctor, "examine_packages", examine_packages)
    findings = doctor.examine()
    assert any(finding.state == "broken" and "disk gone" in finding.found for finding in findings)
    assert by_name(findings)["torch"].state == "ok"


def examine_fake(folder):
    return doctor.examine_extension("fake_package._fake", "speed", "build it", folder)


def test_extension_not_built(tmp_path):
    finding = examine_fake(tmp_path)
    assert (finding.state, finding.cost, finding.remedy) == ("absent", "speed", "build it")


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    folder = tmp_path / "fake_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in ("fake_package", "fake_package._fake"):
        sys.modules.pop(name, None)


def test_extension_of_another_python_is_broken(fake_package):
    (fake_package / "_fake.cpython-30-nowhere.so").write_bytes(b"")
    finding = examine_fake(fake_package)
    assert finding.state == "broken"
    assert "another Python" in finding.found
    assert finding.remedy == "build it"


def test_extension_that_does_not_import_is_broken(fake_package):
    (fake_package / f"_fake{SUFFIX}").write_bytes(b"this is no library")
    finding = examine_fake(fake_package)
    assert finding.state == "broken"
    assert "does not work" in finding.found


def test_extension_that_works_shows_its_build(fake_package, monkeypatch):
    (fake_package / f"_fake{SUFFIX}").write_bytes(b"")
    module = types.ModuleType("fake_package._fake")
    module.build_info = lambda: {"cuda": True, "cuda_archs": ["80", "90a"], "nvshmem_version": ""}
    monkeypatch.setitem(sys.modules, "fake_package._fake", module)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    finding = examine_fake(fake_package)
    assert finding.state == "ok"
    assert finding.found == "cuda: True, cuda archs: 80 90a, nvshmem version: none"


@pytest.mark.parametrize(
    ("built", "found", "state"),
    [("3.4.5", "3.4.5", "ok"), ("3.4.5", "3.5.0", "ok"), ("3.4.5", "3.4.1", "broken"), ("3.4.5", "4.0.0", "broken")],
)
def test_nvshmem_of_another_version(fake_package, monkeypatch, built, found, state):
    (fake_package / f"_fake{SUFFIX}").write_bytes(b"")
    module = types.ModuleType("fake_package._fake")
    module.build_info = lambda: {"nvshmem_built": built, "nvshmem_found": found}
    monkeypatch.setitem(sys.modules, "fake_package._fake", module)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    finding = examine_fake(fake_package)
    assert finding.state == state
    assert built in finding.found
    assert found in finding.found


def test_broken_extension_makes_the_command_fail(monkeypatch, capsys):
    broken = Finding(part="extensions", name="moe_ep._C", state="broken", found="no", remedy="build it")
    monkeypatch.setattr(doctor, "examine_extensions", lambda: [broken])
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "broken: moe_ep._C" in out
    assert "Mend: build it" in out


def test_nvshmem_is_found_and_versioned(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libnvshmem_host.so.3").write_bytes(b"")
    (tmp_path / "include" / "non_abi").mkdir(parents=True)
    header = "".join(
        f"#define NVSHMEM_VENDOR_{part}_VERSION {n}\n" for part, n in (("MAJOR", 3), ("MINOR", 4), ("PATCH", 5))
    )
    (tmp_path / "include" / "non_abi" / "nvshmem_version.h").write_text(header)
    monkeypatch.setenv("MOE_EP_NVSHMEM_DIR", str(tmp_path))
    finding = machine.examine_nvshmem()
    assert finding.state == "ok"
    assert finding.found.startswith("3.4.5 in ")


def test_nvshmem_folder_without_it_is_broken(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_EP_NVSHMEM_DIR", str(tmp_path))
    assert machine.examine_nvshmem().state == "broken"


def test_missing_nvcc_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    finding = by_name(machine.examine_tools())["nvcc"]
    assert finding.state == "absent"
    assert "CUDA_HOME" in finding.remedy


def test_missing_package_names_its_extra(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    for finding in doctor.examine_packages():
        assert finding.state == "absent"
        assert "moe_ep[demo]" in finding.remedy


def fake_cuda(monkeypatch, *, count, peers):
    monkeypatch.setattr(machine, "driver_version", lambda: "13.0")
    monkeypatch.setattr(machine, "run_command", lambda command: "".join(f"GPU {i}: NVIDIA\n" for i in range(count)))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    properties = types.SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=139 * 2**30
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", peers)


def test_gpus_and_peer_access(monkeypatch):
    fake_cuda(monkeypatch, count=2, peers=lambda a, b: True)
    findings = by_name(machine.examine_gpus())
    assert "132 SMs" in findings["GPU 1"].found
    assert findings["peer access"].state == "ok"


def test_missing_peer_access_is_named(monkeypatch):
    fake_cuda(monkeypatch, count=3, peers=lambda a, b: {a, b} != {0, 2})
    finding = by_name(machine.examine_gpus())["peer access"]
    assert finding.state == "absent"
    assert "0-2, 2-0" in finding.found


def test_cpu_torch_beside_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr(machine, "driver_version", lambda: "13.0")
    monkeypatch.setattr(machine, "run_command", lambda command: "GPU 0: NVIDIA\n")
    monkeypatch.setattr(torch.version, "cuda", None)
    finding = by_name(machine.examine_gpus())["GPUs"]
    assert finding.state == "absent"
    assert "--force-reinstall --index-url https://download.pytorch.org/whl/cu" in finding.remedy


@pytest.mark.parametrize(("visible", "state"), [(None, "broken"), ("", "note")])
def test_cuda_that_does_not_start(monkeypatch, visible, state):
    def init():
        raise RuntimeError("the driver is too old")

    fake_cuda(monkeypatch, count=1, peers=lambda a, b: True)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    finding = by_name(machine.examine_gpus())["GPUs"]
    assert finding.state == state
    assert "too old" in finding.found


def test_plain_table_wraps_its_last_column():
    text = plain_table("title", ("a", "b"), [["x", "word " * 30]], width=40)
    assert max(len(line) for line in text.splitlines()) <= 40
    assert text.count("word") == 30


def test_markdown_table_escapes_bars():
    assert markdown_table(("a",), [["x|y"]]) == "| a |\n| --- |\n| x\\|y |\n"


def test_plain_output_where_rich_is_absent():
    code = (
        "import sys; sys.modules['rich'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'rich' else find(name, *a)\n"
        "from moe_ep.cli.main import main; sys.exit(main(['doctor']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "moe_ep._C" in done.stdout
