"""srlm-fast: a fast and faithful trainer for Self-Rewarding Language Models (arXiv 2401.10020)."""

__version__ = "0.1.0"
