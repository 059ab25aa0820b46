"""Compiled kernels: ``pagemgr_abi.h`` is the contract, ``cpu`` and ``cuda`` implement it, ``build.py`` builds them."""
