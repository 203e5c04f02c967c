"""Every setting of a run: typed, frozen, documented once, here.

A `RunConfig` is plain data. It knows what a value means and which values contradict each other; it does not know
where they came from (`config.load`), what DeepSpeed calls them (`config.deepspeed`) or what is built from them.
Fields that depend on the number of processes are checked by `check_world`.
"""

from __future__ import annotations

from typing import Annotated, Literal, cast

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]

Branch = Literal["full", "causal", "local", "axial", "dynamic"]
Branches = tuple[Branch, ...]
Stack = Literal["encoder", "decoder"]
ENCODER_BRANCHES: Branches = ("full", "local", "axial", "dynamic")
DECODER_BRANCHES: Branches = ("causal", "local", "axial")
VOCABULARY_MULTIPLE = 128


def _form_of_branches(value: object) -> str:
    """Return which form a list of branches has: one for all layers, or a pattern of lists."""
    return "pattern" if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple) else "alike"


BRANCH_FORMS = ("alike", "pattern")
LayerBranches = Annotated[
    Annotated[Branches, Tag("alike")] | Annotated[tuple[Branches, ...], Tag("pattern")],
    Discriminator(_form_of_branches),
]


class Section(BaseModel):
    """One section of the configuration: frozen, strict about names and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The architecture. Everything here is part of a checkpoint's identity."""

    hidden_size: Positive = 960
    """Width of the residual stream."""
    ffn_hidden_size: Positive = 16384
    """Width of the gated feed-forward block (gate and up each have this many columns)."""
    num_attention_heads: Positive = 48
    """Heads of every attention branch."""
    head_dim: Positive | None = None
    """Size of one head; hidden_size / num_attention_heads where it is not given. Must be even (rotary pairs)."""
    encoder_layers: NonNegative = 96
    """Encoder layers. 0 makes a decoder-only model."""
    decoder_layers: Positive = 96
    """Decoder layers."""
    encoder_branches: LayerBranches = ENCODER_BRANCHES
    """Parallel attention branches of the encoder layers, out of: full, local, axial, dynamic. A list of lists is a
    pattern: layer i has list i modulo their number."""
    decoder_branches: LayerBranches = DECODER_BRANCHES
    """Parallel self-attention branches of the decoder layers, out of: causal, local, axial; or a pattern, as above."""
    vocab_size: Positive = 32768
    """Pieces of the tokenizer. The table is padded to a multiple of 128 in every layout; padded logits are masked."""
    local_window: Positive = 128
    """Reach W of the local branch: |i - j| < W in the encoder, 0 <= i - j < W in the decoder."""
    axial_width: Positive = 32
    """Row width w of the axial branch; constant, never derived from the length. Needs local_window >= axial_width."""
    positions: Literal["rotary", "sinusoidal", "learned"] = "rotary"
    """Positional encoding; a position is the index inside the document."""
    rotary_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    norm_epsilon: PositiveFloat = 1e-6
    """Epsilon of every RMSNorm."""
    depth_base: Positive = 2
    """Depth (encoder + decoder layers) at which the residual multiplier is 1; it is depth_base / depth (CompleteP)."""
    width_base: Positive = 128
    """Width at which hidden matrices get the full learning rate: theirs is scaled by width_base / hidden_size."""
    output_multiplier: PositiveFloat = 0.5
    """Factor on the logits of the tied table."""
    mlm_head: bool = True
    """Whether the encoder output has a masked-language-modelling head (encoder-decoders only)."""

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token table; depends on nothing but the vocabulary."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def branch_pattern(self, stack: Stack) -> tuple[Branches, ...]:
        """Return the lists of branches that the layers of `stack` take in turn; one where all are alike."""
        given = self.encoder_branches if stack == "encoder" else self.decoder_branches
        return cast(tuple[Branches, ...], given if _form_of_branches(given) == "pattern" else (given,))

    def layer_branches(self, stack: Stack, layer: int) -> Branches:
        """Return the self-attention branches of one layer, counted from 0 in its stack."""
        pattern = self.branch_pattern(stack)
        return pattern[layer % len(pattern)]

    @property
    def is_decoder_only(self) -> bool:
        return self.encoder_layers == 0

    @property
    def has_mlm_head(self) -> bool:
        return self.mlm_head and not self.is_decoder_only

    @property
    def residual_multiplier(self) -> float:
        return self.depth_base / (self.encoder_layers + self.decoder_layers)

    @property
    def width_multiplier(self) -> float:
        """Factor on the learning rate of hidden matrices."""
        return self.width_base / self.hidden_size


class Corpus(Section):
    """One corpus of a blend."""

    prefix: str
    """Path of the indexed shard without .bin / .idx, as megatron-omega preprocess-data wrote it."""
    weight: PositiveFloat = 1.0
    """Share of samples drawn from this corpus, relative to the other weights."""


class Reweight(Section):
    """A change of the blend's weights in mid-run."""

    from_sample: Positive
    """First global sample drawn with these weights."""
    weights: tuple[NonNegativeFloat, ...]
    """One weight for each corpus; 0 leaves it out."""


class DataConfig(Section):
    """The corpus, and how samples are drawn from it."""

    tokenizer: str = ""
    """Path of the SentencePiece model."""
    corpora: tuple[Corpus, ...] = ()
    """Corpora to blend: a list of {prefix, weight}."""
    reweight: tuple[Reweight, ...] = ()
    """Later weights of the blend, each {from_sample, weights}, ascending. No corpus repeats or loses a sample by it."""
    split: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (969.0, 30.0, 1.0)
    """Relative sizes of the train, validation and test parts, cut by documents in each corpus."""
    encoder_seq_length: NonNegative = 2048
    """Tokens of the encoder stream of a sample (0 for decoder-only models)."""
    decoder_seq_length: Positive = 2048
    """Tokens of the decoder stream of a sample."""
    order: Literal["flat", "megatron"] = "flat"
    """Order of samples: flat = a stateless permutation, nothing stored; megatron = megatron-core's GPTDataset order."""
    num_workers: NonNegative = 0
    """Loader processes for each rank that reads data; 0 reads in the training process."""
    prefetch_batches: Positive = 2
    """Micro-batches each loader process keeps ready."""


class ObjectiveConfig(Section):
    """What is asked of the model. Decided per example by (seed, epoch, sample index), never by rank or worker."""

    prefix_lm: NonNegativeFloat = 0.60
    """Weight of prefix language modelling (decoder-only models always use plain language modelling)."""
    span_corruption: NonNegativeFloat = 0.25
    """Weight of span corruption."""
    masked_prefix: NonNegativeFloat = 0.15
    """Weight of masked prefix: tokens of the prefix are masked for the MLM head, the decoder continues it."""
    empty_prefix_fraction: Fraction = 1 / 6
    """Share of prefix-LM examples with an empty prefix: plain text generation."""
    span_rate: Fraction = 0.15
    """Share of tokens replaced by span corruption."""
    span_mean_length: PositiveFloat = 3.0
    """Mean length of a corrupted span, tokens."""
    extreme_span_fraction: Fraction = 1 / 3
    """Share of span-corruption examples that are extreme: rate 0.5, or mean length 32."""
    mask_rate: Fraction = 0.15
    """Share of encoder tokens predicted by the MLM head: 80% masked, 10% replaced, 10% kept."""
    mlm_weight: NonNegativeFloat = 0.5
    """Weight of the MLM loss beside the LM loss."""
    z_loss_weight: NonNegativeFloat = 1e-4
    """Weight of the z-loss (squared log-partition) of both heads."""
    loss_chunk_tokens: Positive = 1024
    """Tokens whose logits are held at a time; full logits never are."""


class ParallelConfig(Section):
    """The layout. data_parallel_size is what remains of the number of processes."""

    tensor_parallel_size: Positive = 1
    """Ranks that share each layer (adjacent ranks)."""
    pipeline_parallel_size: Positive = 1
    """Stages that share the layer list."""
    sequence_parallel: bool = False
    """Shard the residual stream along the sequence between tensor-parallel ranks (Megatron sequence parallelism)."""
    pipeline_schedule: Literal["1f1b", "dualpipev"] = "1f1b"
    """1f1b, or dualpipev: rank r holds stage r and stage 2P-1-r of twice as many stages."""
    stage_boundaries: tuple[NonNegative, ...] | None = None
    """First layer of every stage after the first, as indices into the layer list; cut by cost where it is not given."""
    recompute: Literal["none", "swiglu", "ffn", "full"] = "full"
    """Activations computed again in the backward pass: none; swiglu (gate, up are kept); the FFN; the whole layer."""
    timeout_seconds: Positive = 1800
    """How long a collective may wait before the run is ended."""


class RampUp(Section):
    """Growth of the global batch at the start of a run."""

    start: Positive
    """Global batch size of the first step."""
    increment: Positive
    """Samples added at each growth."""
    samples: Positive
    """Samples over which the batch grows to batch.global_batch_size, in equal parts."""


class BatchConfig(Section):
    """Sizes of a step, in samples. Accumulation follows: global / (micro x data-parallel)."""

    micro_batch_size: Positive = 1
    """Samples of one forward pass of one replica."""
    global_batch_size: Positive = 8
    """Samples of one optimizer step, over all replicas."""
    ramp_up: RampUp | None = None
    """Grow the global batch: {start, increment, samples}."""


class PrecisionConfig(Section):
    """Number formats."""

    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Working format of weights and activations; master weights, moments and reductions are fp32."""
    initial_loss_scale_power: NonNegative = 16
    """fp16: the first loss scale is 2 to this power."""
    loss_scale_window: Positive = 1000
    """fp16: steps without overflow before the loss scale doubles."""
    min_loss_scale: PositiveFloat = 1.0
    """fp16: lower bound of the loss scale."""


class OptimizerConfig(Section):
    """AdamW and clipping."""

    learning_rate: PositiveFloat = 3e-3
    """Peak learning rate at width_base; hidden matrices get it times width_base / hidden_size."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.95
    """Decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Adam epsilon."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices; norms, gains and biases have none."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Bound on the global gradient norm; 0 turns clipping off."""


class ScheduleConfig(Section):
    """Learning rate over steps."""

    decay: Literal["cosine", "linear", "wsd", "inverse_square_root", "constant"] = "cosine"
    """Shape after warm-up. wsd: stable, then linear decay over the last decay_fraction of the steps."""
    warmup_steps: NonNegative = 100
    """Steps of linear warm-up from 0."""
    min_learning_rate_fraction: Fraction = 0.1
    """Final learning rate as a share of the peak (cosine, linear, wsd)."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """wsd: share of the steps spent decaying."""


class TrainingConfig(Section):
    """Length and repeatability."""

    train_steps: Positive = 1000
    """Optimizer steps of the whole run."""
    seed: NonNegative = 1234
    """Seed of weights and data; the only source of randomness."""
    deterministic: bool = False
    """Refuse kernels whose result depends on timing."""


class EvaluationConfig(Section):
    """Validation on held-out text."""

    interval_steps: NonNegative = 200
    """Steps between validations; 0 turns them off. One more runs at the end, and one at the start."""
    num_batches: Positive = 8
    """Global batches of one validation, the same ones every time."""


class CheckpointConfig(Section):
    """Saving and resuming."""

    interval_steps: NonNegative = 200
    """Steps between checkpoints; 0 saves at the end only."""
    keep_last: Positive = 3
    """Newest checkpoints that are kept."""
    keep_every_steps: NonNegative = 0
    """Also keep every checkpoint whose step is a multiple of this; 0: none."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""
    drop_optimizer_from_older: bool = False
    """Remove the optimizer state from kept checkpoints other than the newest keep_last."""
    asynchronous: bool = True
    """Write behind training; it stops only for one copy to memory."""
    resume: bool = True
    """Continue from the newest valid checkpoint of the run folder, if there is one."""
    load: str | None = None
    """Start from this checkpoint (a step-... folder, or a run's checkpoints folder) when the run folder has none."""
    load_weights_only: bool = False
    """With load: take the weights, start optimizer, schedule and data afresh."""


class ResilienceConfig(Section):
    """Stopping, failing, and what to do about bad steps."""

    max_minutes: PositiveFloat | None = None
    """Minutes after which the run saves and ends with exit code 75, to be started again (--max-minutes)."""
    monitor: bool = True
    """Watch every rank from a process beside it: ends all ranks when one fails, and names a rank that hangs."""
    start_timeout_seconds: PositiveFloat = 600.0
    """How long ranks may take to arrive at the start."""
    hang_timeout_seconds: PositiveFloat | None = None
    """How long a step may make no progress; follows from the measured step times where it is not given."""
    spike_z_score: NonNegativeFloat = 8.0
    """Robust z-score of the loss above which a step is skipped; 0 skips only what is not finite."""
    spike_window: Annotated[int, Field(ge=8)] = 64
    """Accepted steps that the z-score is measured against; none is judged before a quarter of them is there."""
    spike_limit: Positive = 3
    """Bad steps in a row after which the run goes back to its last checkpoint and leaves their samples out."""
    max_rollbacks: NonNegative = 3
    """How often a run goes back before it gives up."""
    integrity_interval_steps: NonNegative = 100
    """Steps between comparisons of weights that must be equal on several ranks; 0: never."""
    straggler_window: NonNegative = 20
    """Steps over which a rank must be the slowest of its peers to be named; 0 does not measure."""


class LoggingConfig(Section):
    """What a run leaves behind."""

    run_directory: str = "runs/omega"
    """Folder of everything this run writes."""
    interval_steps: Positive = 1
    """Steps between log lines (metrics.jsonl has every step)."""
    progress_bar: bool = True
    """Show a bar on a terminal."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Log to Weights & Biases; its failure never stops a run."""
    wandb_project: str = "megatron-omega"
    """Project of the wandb run."""
    peak_flops: PositiveFloat | None = None
    """Peak FLOP/s of one device for MFU; known for common GPUs, measured once on a CPU, where it is not given."""


class RunConfig(Section):
    """A whole run."""

    model: ModelConfig = ModelConfig()
    """Architecture."""
    data: DataConfig = DataConfig()
    """Corpus and samples."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """Objectives and losses."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout."""
    batch: BatchConfig = BatchConfig()
    """Batch sizes."""
    precision: PrecisionConfig = PrecisionConfig()
    """Number formats."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate."""
    training: TrainingConfig = TrainingConfig()
    """Length and seed."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Validation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    resilience: ResilienceConfig = ResilienceConfig()
    """Stopping, failing, bad steps."""
    logging: LoggingConfig = LoggingConfig()
    """Logs and run folder."""
