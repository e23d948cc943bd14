"""`python -m qkernels bench`: whole networks on this machine, against the engines that are installed."""
