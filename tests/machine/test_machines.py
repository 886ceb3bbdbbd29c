"""The catalogue of devices and clusters, and how they are named."""

from __future__ import annotations

import pytest

from ridgeline.errors import MachineError
from ridgeline.machine.cluster import cluster, clusters, full_device_name, parse_devices
from ridgeline.machine.device import ORIGINS, device, devices, recognise


def test_every_number_says_how_it_is_known() -> None:
    for each in devices().values():
        assert each.source
        known = {"memory_gib": each.memory_bytes, "memory_tb_s": each.memory_bandwidth}
        for name, value in known.items():
            assert (value is None) == (name not in each.origins)
        assert set(each.origins.values()) <= set(ORIGINS)


def test_every_cluster_has_links_that_reach_its_node() -> None:
    for each in clusters().values():
        assert each.node.links[-1][0] == each.node.devices
        assert each.network.node_bandwidth > 0
        assert each.source


@pytest.mark.parametrize(
    "name", ["Frontier", "LUMI", "Fugaku", "Selene", "Summit", "DGX H100", "DGX H200",
             "Llama 3 cluster", "GB200 NVL72", "MI300X nodes"],
)  # fmt: skip
def test_the_named_machines_are_there(name: str) -> None:
    assert cluster(name).name == name


def test_frontier_is_as_its_user_guide_says() -> None:
    frontier = cluster("Frontier")
    assert frontier.nodes == 9408
    assert frontier.nodes * frontier.node.devices == 75264
    assert frontier.network.node_bandwidth == 100e9
    assert frontier.node.links == ((2, 200e9), (8, 100e9))


def test_a_bare_mi250x_is_refused_with_both_readings() -> None:
    for ask in (device, cluster, full_device_name):
        with pytest.raises(MachineError, match="384 Frontier nodes") as caught:
            ask("MI250X")
        assert "GCD" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [
        ("16384xH100", 16384, "DGX H100"),
        ("16,384 x H100-SXM-80GB", 16384, "DGX H100"),
        ("3072xFrontier", 3072, "Frontier"),
        ("8xH200", 8, "DGX H200"),
        ("512xMI250X-GCD", 512, "Frontier"),
        ("64xLlama 3 cluster", 64, "Llama 3 cluster"),
    ],
)
def test_devices_are_said_in_one_sentence(text: str, count: int, name: str) -> None:
    found, machine = parse_devices(text)
    assert (found, machine.name) == (count, name)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("H100", "8xH100"),
        ("0xH100", "1xH100"),
        ("-5xH100", "1xH100"),
        ("999999999999xH100", "10000000xH100"),
        ("8xFrontie", "Frontier"),
        ("8xSelena", "Selene"),
        ("8xH1000", "H100"),
        ("75272xFrontier", "75264xFrontier"),
        ("8xV100", "V100-SXM2-16GB"),
        ("8xMI250X", "MI250X-GCD"),
    ],
)
def test_impossible_machines_are_named_errors(text: str, hint: str) -> None:
    with pytest.raises(MachineError) as caught:
        parse_devices(text)
    assert hint in f"{caught.value.rule} {caught.value.remedy}"


def test_pytorchs_names_are_recognised() -> None:
    found = recognise("NVIDIA H100 80GB HBM3")
    assert found is not None
    assert found.name == "H100-SXM-80GB"
    assert recognise("a toaster") is None
