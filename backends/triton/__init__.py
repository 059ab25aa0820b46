"""The ``triton`` backend: one operation a file, each kernel with its launcher.

backend ─► attention ─► decode, prefill ─► tile ─► quantised     sizes, launch and device serve all of them;
        ─► write, copy, merge                                    library is the backend as operations of torch
"""
