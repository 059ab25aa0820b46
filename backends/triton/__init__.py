"""The ``triton`` backend: one operation a file, each kernel with its launcher.

backend ─► attention ─► decode, prefill ─► tile ─► quantised     sizes, launch, call and device serve all of them;
        │            └► widen                                    library is the backend as operations of torch
        └► write, copy, merge
"""
