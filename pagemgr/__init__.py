"""pagemgr: the memory manager that an LLM inference engine embeds for its KV cache."""
