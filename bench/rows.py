"""The rows of `bench.table`, as data: every target that a command here measures, section by section."""

from collections.abc import Callable

from bench.row import LESS, Report, Row
from bench.startup import TRACED_FUNCTIONS

# --- decoding ---------------------------------------------------------------------------------------------------

LLAMA_CPP = "llama.cpp"
SHORT = ("--peers", LLAMA_CPP, "--turns", "3")
BF16 = ("bench.decode", "--preset", "gpt2-124m", *SHORT, "--new-tokens", "64")
PROMPT = (
    "bench.decode",
    "--preset",
    "gpt2-124m",
    "--batch",
    "1",
    *SHORT,
    "--prompt-tokens",
    "1016",
    "--new-tokens",
    "8",
    "--prompt-floor",
    "--no-agreement",
)
QUICK = ("bench.decode", "--preset", "quick", "--vocab-size", "2048")
SPECULATION = ("bench.speculation", "--preset", "quick", "--vocab-size", "2048", "--turns", "9")
NAMES = {"bfloat16": "bf16", "int8": "q8_0", "int4": "q4_0"}
"""Of llama.cpp's weights, by precision."""


def weights(preset: str, *sizes: str) -> tuple[str, ...]:
    """The command for quantised weights of a shape."""
    return ("bench.decode", "--preset", preset, "--weights", "int8", *SHORT, *sizes)


def decoding(
    section: str, shape: str, precision: str, batch: int, target: float | None, command: tuple[str, ...]
) -> Row:
    """The engine beside llama.cpp in one precision."""
    of = f"batches/{batch}/contestants"
    crowd = "one sequence" if batch == 1 else f"{batch} sequences"
    return Row(
        section,
        f"{shape}, {'bf16' if precision == 'bfloat16' else precision}, {crowd}",
        command,
        f"{of}/engine {precision}/decode_tokens_per_second",
        "tokens/s",
        target,
        peer=f"{LLAMA_CPP} {NAMES[precision]}",
        peer_figure=f"{of}/{LLAMA_CPP} {precision}/decode_tokens_per_second",
        ratio_figure=f"{of}/{LLAMA_CPP} {precision}/engine_ratio_at_equal_precision",
        floor_figure=f"{of}/engine {precision}/share_of_floor" if precision == "bfloat16" else "",
    )


def speculated(text: str, kind: str, batch: int, target: float) -> Row:
    """The engine with speculation beside the same without."""
    of = f"texts/{kind}, {batch}"
    return Row(
        "speculation",
        f"{text}, {'one sequence' if batch == 1 else f'{batch} sequences'}",
        SPECULATION,
        f"{of}/with",
        "tokens/s",
        target,
        peer="without speculation",
        peer_figure=f"{of}/without",
        ratio_figure=f"{of}/ratio",
    )


def share_of_python(batch: int) -> Callable[[Report], float]:
    """In percent of a decoding step of `quick`."""
    return lambda report: 100 * report["batches"][str(batch)]["contestants"]["engine bfloat16"]["share_of_python"]


GPT2 = weights("gpt2-124m", "--new-tokens", "64")
FEW = ("--prompt-tokens", "8", "--new-tokens", "16", "--no-agreement")
DECODING = [
    decoding("decoding", "GPT-2 124M", "bfloat16", 1, 1.4, BF16),
    decoding("decoding", "GPT-2 124M", "bfloat16", 16, 2.5, BF16),
    decoding("decoding", "GPT-2 124M", "int8", 1, 1.2, GPT2),
    decoding("decoding", "GPT-2 124M", "int8", 16, 2.5, GPT2),
    decoding("decoding", "GPT-2 124M", "int4", 1, 1.1, GPT2),
    decoding("decoding", "GPT-2 124M", "int4", 16, 1.5, GPT2),
    Row(
        "decoding",
        "a prompt of 1,016 tokens, GPT-2 124M, bf16",
        PROMPT,
        "batches/1/contestants/engine bfloat16/prompt_tokens_per_second",
        "tokens/s",
        1.0,
        peer=f"{LLAMA_CPP} bf16",
        peer_figure=f"batches/1/contestants/{LLAMA_CPP} bfloat16/prompt_tokens_per_second",
        ratio_figure=f"batches/1/contestants/{LLAMA_CPP} bfloat16/engine_prompt_ratio",
        floor_figure="batches/1/contestants/engine bfloat16/share_of_prompt_floor",
    ),
    Row(
        "decoding",
        "its share of the floor",
        PROMPT,
        lambda report: 100 * report["batches"]["1"]["contestants"]["engine bfloat16"]["share_of_prompt_floor"],
        "%",
        90,
    ),
    *(
        decoding("shapes", shape, precision, batch, None, weights(preset, *FEW))
        for preset, shape in (("qwen3-0.6b", "Qwen3-0.6B"), ("llama-3.2-1b", "Llama-3.2-1B"))
        for precision in ("int8", "int4")
        for batch in (1, 16)
    ),
    *(
        Row(
            "small",
            f"`quick`, bf16, {'one sequence' if batch == 1 else f'{batch} sequences'}",
            QUICK,
            f"batches/{batch}/contestants/engine bfloat16/decode_tokens_per_second",
            "tokens/s",
            target,
            floor_figure=f"batches/{batch}/contestants/engine bfloat16/share_of_floor",
        )
        for batch, target in ((1, 3000), (16, 13000))
    ),
    *(
        Row(
            "small",
            f"Python's share of a step, {'one sequence' if batch == 1 else f'{batch} sequences'}",
            QUICK,
            share_of_python(batch),
            "%",
        )
        for batch in (1, 16)
    ),
    *(
        speculated(text, kind, batch, target)
        for batch in (1, 16)
        for text, kind, target in (
            ("a text that repeats itself", "loop", 1.6),
            ("an edited copy of the prompt", "edit", 1.6),
            ("a text that does not repeat itself", "without", 0.97),
        )
    ),
]

# --- weights of 8 and 4 bits ------------------------------------------------------------------------------------

BITS = ("bench.quantised", "--data", "shakespeare", "--bytes", "50000", "--steps", "100")


def worse(name: str) -> Callable[[Report], float]:
    """By how many percent of the engine's bits in fp32."""
    return lambda report: 100 * (report[name] / report["engine fp32"] - 1)


QUALITY_OF_WEIGHTS = [
    Row("weights", "int8, bits per byte more than in fp32", BITS, worse("engine int8"), "%", 0.1, LESS),
    Row("weights", "int4, bits per byte more than in fp32", BITS, worse("engine int4"), "%", 1.5, LESS),
    Row(
        "weights",
        "int4, bits per byte",
        BITS,
        "engine int4",
        "bits",
        1.0,
        LESS,
        peer=f"{LLAMA_CPP} q4_0",
        peer_figure="llama.cpp q4_0",
        ratio_figure=lambda report: report["engine int4"] / report["llama.cpp q4_0"],
    ),
]

# --- waiting ----------------------------------------------------------------------------------------------------

STARTUP = ("bench.startup", "--times", "3")
AFTER = [phase for _, function, phase in TRACED_FUNCTIONS if function in ("build", "_figures", "publish")]
WAITING = [
    Row("waiting", "a job of 20 steps of `quick`", STARTUP, lambda r: sum(r["run"].values()), "s", 12, LESS),
    Row("waiting", "`serve run` to ready, `quick`", STARTUP, lambda r: sum(r["serve"].values()), "s", 7, LESS),
    Row("waiting", "`serve run` to ready, 124M", STARTUP, lambda r: sum(r["serve 124M"].values()), "s", 12, LESS),
    Row("waiting", "a second replica", STARTUP, lambda r: sum(r["second replica"].values()), "s", 2, LESS),
    Row("waiting", "a reload, from the alias's move", STARTUP, lambda r: sum(r["reload"].values()), "s", 4, LESS),
    Row("waiting", "`gptcore.generate`, first token", STARTUP, lambda r: sum(r["generate"].values()), "s", 2, LESS),
    Row(
        "waiting",
        "after training: package, figures, registration, gate",
        STARTUP,
        lambda report: sum(report["run"][phase] for phase in AFTER),
        "s",
        3,
        LESS,
    ),
]

# --- training ---------------------------------------------------------------------------------------------------

SEEDS = ("--seeds", "1", "2", "3", "4", "5")
QUICKLY = ("bench.time_to_quality", "--data", "shakespeare", "--bpb", "2.1203", *SEEDS)
ROUGHLY = ("bench.time_to_quality", "--data", "shakespeare", "--bpb", "2.712", *SEEDS)
BEST = (
    "bench.time_to_quality",
    "--data",
    "shakespeare",
    "--bpb",
    "2.05",
    "--set",
    "max_minutes=5",
    "target_bits_per_byte=1",
)
LOOPS = ("bench.training", "--preset", "gpt2-124m")
JOB = ("bench.ray_overhead", "--turns", "3", "--seconds", "20")
TRAINING = [
    Row("quality", "tiny Shakespeare to 2.1203 bits/byte, median seed", QUICKLY, "seconds", "s", 40, LESS),
    Row("quality", "the slowest of these five seeds", QUICKLY, "slowest", "s"),
    Row("quality", "seeds that reach 2.1203", QUICKLY, "reached_count", "seeds", 5),
    Row("quality", "tiny Shakespeare to 2.712 bits/byte, median seed", ROUGHLY, "seconds", "s", 4, LESS),
    Row("quality", "seeds that reach 2.712", ROUGHLY, "reached_count", "seeds", 5),
    Row("quality", "the best in five minutes", BEST, "best_bits_per_byte", "bits/byte", 2.05, LESS),
    Row(
        "training",
        "GPT-2 124M's shape",
        LOOPS,
        "contestants/ours/tokens_per_second",
        "tokens/s",
        1.3,
        peer="transformers",
        peer_figure="contestants/transformers/tokens_per_second",
        ratio_figure="ratio",
    ),
    Row(
        "training",
        "the Ray job",
        JOB,
        "job_tokens_per_second",
        "tokens/s",
        0.98,
        peer="the bare loop",
        peer_figure="bare_tokens_per_second",
        ratio_figure="ratio",
    ),
]

# --- serving ----------------------------------------------------------------------------------------------------

STREAMS = ("bench.serve", "--concurrency", "16", "--no-naive")
CROWD = (
    "bench.serve",
    "--concurrency",
    "16",
    "64",
    "--no-naive",
    "--new-tokens",
    "32",
    "--requests",
    "3",
    "--turns",
    "2",
)
TINY = ("bench.serve", "--preset", "tiny", "--concurrency", "16", "--no-naive", "--new-tokens", "1", "--requests", "50")
SERVICE = "contestants/service"

TURN = ("bench.second_turn",)


def longest_wait(report: Report) -> float:
    """The longest wait for a first text over the median."""
    waits = report["concurrency"]["64"]["contestants"]["service"]["first_token_ms"]
    return float(waits["max"] / waits["p50"])


def kept(report: Report) -> float:
    """The rate with 64 streams over that with 16."""
    rate = {n: report["concurrency"][n]["contestants"]["service"]["tokens_per_second"] for n in ("16", "64")}
    return float(rate["64"] / rate["16"])


SERVING = [
    Row(
        "serving",
        "16 streams, GPT-2 124M",
        STREAMS,
        f"concurrency/16/{SERVICE}/tokens_per_second",
        "tokens/s",
        0.95,
        peer="the engine alone",
        peer_figure="concurrency/16/contestants/engine/tokens_per_second",
        ratio_figure="concurrency/16/of_engine",
    ),
    Row(
        "serving",
        "their first text, later than the engine's",
        STREAMS,
        "concurrency/16/first_token_added_ms",
        "ms",
        5,
        LESS,
    ),
    Row(
        "serving",
        "64 streams on 16 slots",
        CROWD,
        f"concurrency/64/{SERVICE}/tokens_per_second",
        "tokens/s",
        1.0,
        peer="16 streams",
        peer_figure=f"concurrency/16/{SERVICE}/tokens_per_second",
        ratio_figure=kept,
    ),
    Row("serving", "their longest wait, over the median", CROWD, longest_wait, "times", 2, LESS),
    Row(
        "serving",
        "a second turn of 64 tokens behind 512, until its first text",
        TURN,
        "first_text_ms/second",
        "ms",
        1.25,
        LESS,
        peer="the 64 tokens alone",
        peer_figure="first_text_ms/alone",
        ratio_figure="of_new_tokens_alone",
    ),
    Row(
        "serving",
        "requests of one token, a tiny model",
        TINY,
        f"concurrency/16/{SERVICE}/requests_per_second",
        "requests/s",
        500,
    ),
]

# --- data -------------------------------------------------------------------------------------------------------

DATA = ("bench.data", "--gigabytes", "2")
TEXT = [
    Row(
        "data",
        "tokenising, one thread, GPT-2's vocabulary",
        DATA,
        "contestants/ours/megabytes_per_second",
        "MB/s",
        0.95,
        peer="tiktoken's batch",
        peer_figure="contestants/tiktoken/megabytes_per_second",
        ratio_figure="ratio",
    ),
    Row(
        "data",
        "memory with a text of 2 GB",
        DATA,
        "peak_mib",
        "MiB",
        1.05,
        LESS,
        peer="an eighth of it",
        peer_figure="peak_mib_of_an_eighth",
        ratio_figure="growth",
    ),
    Row("data", "a second run has its tokens after", DATA, "second_run_seconds", "s", 1, LESS),
]

ROWS = [*DECODING, *QUALITY_OF_WEIGHTS, *WAITING, *TRAINING, *SERVING, *TEXT]
