"""The devices that are known by name: figures of data sheets, each with its source.

Products are dense peaks, without sparsity. What no data sheet vouches for is marked so. Links are
half of what the sheets say, which count both ways; a machine has the vendor's 8 devices, and the
network is one adapter a device, as in the vendor's own systems (DGX, Instinct platforms).
"""

from __future__ import annotations

from rorqual.plan.hardware import CPU_STEP_TOKENS, GB, TERA, Hardware, Source

_SPARSE = "products are half of the sheet's, which are with sparsity"
_SUMS = "sums in float32"
NDR = 50 * GB  # 400 Gbit/s
HDR = 25 * GB  # 200 Gbit/s
PCIE4, PCIE5 = 32 * GB, 64 * GB  # 16 lanes


def _products(bf16: float, fp8: float | None = None) -> dict[str, float]:
    """FLOP/s of TFLOP/s."""
    return {"bf16": bf16 * TERA} | ({} if fp8 is None else {"fp8": fp8 * TERA})


def _sheet(title: str, year: int, note: str | None = None, vendor: str = "NVIDIA") -> Source:
    return Source(title, vendor, year, note=note)


_HOPPER = _products(989.5, 1979)
_CDNA3 = _products(1307.4, 2614.9)
# Seven links of 64 GB/s each way to the seven others.
_INFINITY_FABRIC = 7 * 64 * GB

ACCELERATORS = (
    Hardware(
        "A100-40",
        40 * GB,
        1.555e12,
        _products(312),
        _sheet("A100 Tensor Core GPU data sheet", 2020, "SXM; no FP8"),
        link_rate=300 * GB,
        network_rate=HDR,
    ),
    Hardware(
        "A100-80",
        80 * GB,
        2.039e12,
        _products(312),
        _sheet("A100 Tensor Core GPU data sheet", 2021, "SXM; no FP8"),
        link_rate=300 * GB,
        network_rate=HDR,
    ),
    Hardware(
        "H100",
        80 * GB,
        3.35e12,
        _HOPPER,
        _sheet("H100 Tensor Core GPU data sheet", 2023, f"SXM; {_SPARSE}"),
        link_rate=450 * GB,
        network_rate=NDR,
    ),
    Hardware(
        "H800",
        80 * GB,
        3.35e12,
        _HOPPER,
        Source(
            "DeepSeek-V3 report §3.1, arXiv 2412.19437",
            "DeepSeek",
            2024,
            is_data_sheet=False,
            note="taken as the H100 SXM's, but for NVLink: 160 GB/s each way are reached, and "
            "50 GB/s of InfiniBand (§3.2.2)",
        ),
        link_rate=160 * GB,
        network_rate=NDR,
    ),
    Hardware(
        "H20",
        96 * GB,
        4e12,
        _products(148, 296),
        Source(
            "figures of the press and of sellers",
            "NVIDIA",
            2024,
            is_data_sheet=False,
            note="SXM; there is no public sheet; boards with 141 GB came later",
        ),
        link_rate=450 * GB,
        network_rate=NDR,
    ),
    Hardware(
        "H200",
        141 * GB,
        4.8e12,
        _HOPPER,
        _sheet("H200 Tensor Core GPU data sheet", 2024, f"SXM; {_SPARSE}"),
        link_rate=450 * GB,
        network_rate=NDR,
    ),
    Hardware(
        "B200",
        180 * GB,
        8e12,
        _products(2250, 4500),
        _sheet("DGX B200 data sheet", 2024, f"an eighth of the system; {_SPARSE}"),
        link_rate=900 * GB,
        network_rate=NDR,
    ),
    Hardware(
        "MI300X",
        192 * GB,
        5.3e12,
        _CDNA3,
        _sheet("Instinct MI300X Accelerator data sheet", 2023, vendor="AMD"),
        link_rate=_INFINITY_FABRIC,
        network_rate=NDR,
    ),
    Hardware(
        "MI325X",
        256 * GB,
        6e12,
        _CDNA3,
        _sheet("Instinct MI325X Accelerator data sheet", 2024, vendor="AMD"),
        link_rate=_INFINITY_FABRIC,
        network_rate=NDR,
    ),
    Hardware(
        "910B",
        64 * GB,
        1.6e12,
        _products(376),
        Source(
            "Serving Large Language Models on Huawei CloudMatrix384, arXiv 2506.12708",
            "Huawei",
            2025,
            is_data_sheet=False,
            note="half of an Ascend 910C, which is two such dies (752 TFLOP/s, 128 GB, "
            "3.2 TB/s); boards that were sold as 910B differ by up to a third; no FP8",
        ),
        runs_ours=False,
    ),
    Hardware(
        "L40S",
        48 * GB,
        864e9,
        _products(362.05, 733),
        _sheet("L40S data sheet", 2023),
        link_rate=PCIE4,
    ),
    Hardware(
        "RTX3090",
        24 * GB,
        936e9,
        _products(71),
        _sheet("Ampere GA102 GPU Architecture whitepaper, appendix A", 2020, f"{_SUMS}; no FP8"),
        link_rate=PCIE4,
    ),
    Hardware(
        "RTX4090",
        24 * GB,
        1.008e12,
        _products(165.2, 330.3),
        _sheet("Ada GPU Architecture whitepaper, appendix A", 2022, _SUMS),
        link_rate=PCIE4,
    ),
    Hardware(
        "RTX5090",
        32 * GB,
        1.792e12,
        _products(209.5, 419),
        _sheet("RTX Blackwell GPU Architecture whitepaper, appendix A", 2025, _SUMS),
        link_rate=PCIE5,
    ),
)


def _apple(
    name: str, memory: int, bandwidth: float, cores: int, clock: float, year: int
) -> Hardware:
    """A Mac with the most memory that was sold. Macs are not joined to one machine here."""
    return Hardware(
        name,
        memory * GB,
        bandwidth,
        _products(cores * 128 * 2 * clock / 1e3),
        Source(
            "newsroom, technical specifications of the Mac Studio",
            "Apple",
            year,
            is_data_sheet=False,
            note="memory and bandwidth are Apple's; products are not: "
            f"{cores} GPU cores x 128 lanes x 2 x {clock} GHz. macOS gives a GPU three quarters of "
            "the memory until `sysctl iogpu.wired_limit_mb` says more",
        ),
        runs_ours=False,
        node_devices=1,
    )


MACS = (
    _apple("M1Ultra", 128, 800e9, 64, 1.296, 2022),
    _apple("M2Ultra", 192, 800e9, 76, 1.398, 2023),
    _apple("M3Ultra", 512, 819e9, 80, 1.38, 2025),
)


def server_bandwidth(channels: int, megatransfers: float) -> float:
    """Bytes a second of memory channels, each 8 bytes wide."""
    return channels * megatransfers * 1e6 * 8


def server_flops(cores: int, clock: float, bf16_per_cycle: int) -> dict[str, float]:
    """FLOP/s at a clock in GHz; float32 takes twice the time of bfloat16."""
    bf16 = cores * clock * 1e9 * bf16_per_cycle
    return {"bf16": bf16, "float32": bf16 / 2}


def _server(
    name: str, cores: tuple[int, float, int], channels: tuple[int, int], vendor: str, year: int
) -> Hardware:
    """One socket with a module of 64 GB in each channel."""
    num_cores, clock, per_cycle = cores
    num_channels, megatransfers = channels
    return Hardware(
        name,
        num_channels * 64 * GB,
        server_bandwidth(num_channels, megatransfers),
        server_flops(num_cores, clock, per_cycle),
        Source(
            "product specification",
            vendor,
            year,
            note=f"one socket; {num_channels} channels x {megatransfers:,} MT/s x 8 bytes, 64 GB "
            f"each; {num_cores} cores x {clock} GHz x {per_cycle} bfloat16 FLOP a cycle",
        ),
        step_tokens=CPU_STEP_TOKENS,
        is_cpu=True,
        node_devices=2,
    )


# (cores, base clock in GHz, bfloat16 FLOP a core and cycle), (channels, MT/s). Zen 4 multiplies
# 32 pairs in bfloat16 a cycle with AVX-512, Zen 5 twice as many, Intel's AMX 512.
SERVERS = (
    _server("EPYC9654", (96, 2.4, 64), (12, 4800), "AMD", 2022),
    _server("EPYC9755", (128, 2.7, 128), (12, 6000), "AMD", 2024),
    _server("XEON8480+", (56, 2.0, 1024), (8, 4800), "Intel", 2023),
    _server("XEON6980P", (128, 2.0, 1024), (12, 6400), "Intel", 2024),
)
HARDWARE: dict[str, Hardware] = {device.name: device for device in (*ACCELERATORS, *MACS, *SERVERS)}
