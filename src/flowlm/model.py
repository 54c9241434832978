class FlowLM: pass
