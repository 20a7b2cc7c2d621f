"""LoRA adapters of an engine: asked for by requests, or loaded and dropped by hand."""

from nanovllm.engine.adapter_runner import drop_adapter, load_adapter
from nanovllm.engine.adapters import AdapterTable
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import ArgumentError, shown
from nanovllm.features.rpc import call_ranks
from nanovllm.lora_request import LoRARequest
from nanovllm.validation import check_at_least


def start(llm: LLMEngine) -> None:
    """Let a new engine take requests with adapters, if its configuration says so."""
    if llm.config.enable_lora:
        table = AdapterTable(llm.config, llm.executor, llm.requests)
        llm.input_processor.adapters = table
        llm.scheduler.new_queue = table.queue(llm.scheduler.new_queue)
        llm.scheduler.clear()


def add_lora(llm: LLMEngine, lora_request: LoRARequest) -> bool:
    """Read an adapter before a request asks for it.

    Returns:
        Whether it was read. False: it was in host memory already.

    Raises:
        ArgumentError: as of `generate` with this `lora_request`.
    """
    table = _table(llm)
    if not isinstance(lora_request, LoRARequest):
        raise ArgumentError(f"lora_request must be a LoRARequest, got {shown(lora_request)}")
    table.register(lora_request)
    arguments = table.load_arguments(lora_request.lora_int_id)
    return bool(call_ranks(llm, load_adapter, args=arguments)[0])


def remove_lora(llm: LLMEngine, lora_id: int) -> bool:
    """Forget an adapter, in host memory and on the device.

    Returns:
        Whether it was known.

    Raises:
        ArgumentError: an unfinished request uses it.
    """
    table, number = _table(llm), check_at_least("lora_id", lora_id, 1)
    if number not in table.known:
        return False
    table.check_unused(number)
    call_ranks(llm, drop_adapter, args=(table.roots[number],))
    table.pinned.discard(number)
    table.forget(number)
    return True


def list_loras(llm: LLMEngine) -> set[int]:
    """The numbers of the adapters in host memory, those in slots among them."""
    table = _table(llm)
    adapters = llm.model_runner.adapters
    assert adapters is not None
    loaded = adapters.loaded()
    return {number for number, root in table.roots.items() if root in loaded}


def pin_lora(llm: LLMEngine, lora_id: int) -> bool:
    """Keep an adapter, until `remove_lora`: it makes room for others only if nothing else can.

    Returns:
        True.

    Raises:
        ArgumentError: there is no such adapter.
    """
    table, number = _table(llm), check_at_least("lora_id", lora_id, 1)
    if number not in table.known:
        raise ArgumentError(f"there is no adapter {number}: call add_lora first")
    table.pinned.add(number)
    call_ranks(llm, load_adapter, args=table.load_arguments(number))
    return True


def _table(llm: LLMEngine) -> AdapterTable:
    llm.check_ready()
    table = llm.input_processor.adapters
    if table is None:
        raise ArgumentError("the engine takes no adapters: it needs LLM(..., enable_lora=True)")
    return table
