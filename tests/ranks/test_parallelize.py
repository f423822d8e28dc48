"""tpk.parallelize on unmodified Hugging Face models against the unsplit model."""

import copy

import families
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import assert_same_grads, count_all_reduces
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

import tpkernels as tpk
from tpkernels.parallelization.styles import STYLES


def equal_to_unsplit(family, dtensor):
    stock = families.make(family)
    model = tpk.parallelize(copy.deepcopy(stock), dist.group.WORLD, dtensor=dtensor)
    ids, labels = families.batch()
    with torch.no_grad():
        want = stock(ids).logits
        assert (model(ids).logits - want).abs().max() < 1e-4 * want.abs().max()
    loss, want_loss = model(ids, labels=labels).loss, stock(ids, labels=labels).loss
    assert abs(loss - want_loss) < 1e-5 * want_loss
    with torch.no_grad():
        items = torch.tensor(37)
        scaled = model(ids, labels=labels, num_items_in_batch=items).loss
        assert (
            abs(scaled - stock(ids, labels=labels, num_items_in_batch=items).loss) < 1e-5 * scaled
        )
    loss.backward()
    want_loss.backward()
    assert_same_grads(stock, model)
    norm = tpk.clip_grad_norm_(model.parameters(), 0.5)
    want_norm = torch.nn.utils.clip_grad_norm_(stock.parameters(), 0.5)
    assert abs(norm - want_norm) < 1e-5 * want_norm
    foreach = dict(foreach=True) if dtensor else {}
    for m in (model, stock):
        torch.optim.AdamW(m.parameters(), 1e-3, **foreach).step()
    with torch.no_grad():
        after, want = model(ids, labels=labels).loss, stock(ids, labels=labels).loss
    assert abs(after - want) < 2e-5 * want
    for cache in (None, "static"):
        options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
        mask = torch.ones_like(ids[:, :9])
        mask[0, :3] = 0
        tokens = [
            m.generate(ids[:, :9], attention_mask=mask, cache_implementation=cache, **options)
            for m in (model, stock)
        ]
        assert torch.equal(*tokens)


@pytest.mark.parametrize("ranks, dtensor", [(2, True), (3, False), (4, True), (4, False)])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_equal_to_unsplit(pool, family, ranks, dtensor):
    pool.run(ranks, equal_to_unsplit, family, dtensor)


def llama_pair(dtensor=True, **changes):
    stock = families.make("llama", **changes)
    return stock, tpk.parallelize(copy.deepcopy(stock), dist.group.WORLD, dtensor=dtensor)


def collectives_of_a_block(family, dtensor):
    stock = families.make(family)
    model = tpk.parallelize(copy.deepcopy(stock), dist.group.WORLD, dtensor=dtensor)
    ids, labels = families.batch()
    with tpk.log_collectives() as log:
        forward, output = count_all_reduces(lambda: model(ids, labels=labels))
    tags = [c.tag for c in log]
    blocks = model.config.num_hidden_layers
    assert tags.count("row_forward") == 2 * blocks and {c.chunks for c in log} == {1}
    assert forward == len(tags) == 2 * blocks + tags.count("embedding") + tags.count("loss")
    assert tags.count("loss") == 2 and tags.count("embedding") == 1
    with tpk.log_collectives() as log:
        backward, _ = count_all_reduces(output.loss.backward)
    tags = [c.tag for c in log]
    assert tags.count("column_backward") == 2 * blocks
    assert (
        backward
        == len(tags)
        == 2 * blocks + tags.count("head_backward") + tags.count("replicated_gradients")
    )
    assert tags.count("head_backward") == 1
    replicated = (
        family == "qwen3" or dist.get_world_size() > 3
    )  # q_norm and k_norm; KV heads on more ranks than there are
    assert tags.count("replicated_gradients") == (blocks if replicated else 0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2"])
def test_two_all_reduces_a_block_each_way(pool, family):
    pool.run(2, collectives_of_a_block, family, True)
    if family != "gpt2":  # 9 KV heads
        pool.run(4, collectives_of_a_block, family, False)


def parameter_bytes(family):
    stock = families.make(family)
    whole = sum(p.nbytes for p in stock.parameters())
    model = tpk.parallelize(stock, dist.group.WORLD)
    return sum(p.to_local().nbytes for p in model.parameters()) / whole


def test_parameter_bytes_a_rank(pool):
    # The heads go 2 + 1 groups on 2 ranks: a padded 2/3 of attention, which is a third of these parameters.
    for ranks, most in ((2, 0.5 * 1.05 + (2 / 3 - 1 / 2) * 0.35), (3, 1.05 / 3)):
        assert max(pool.run(ranks, parameter_bytes, "llama")) <= most


def runs(case, dtensor):
    """One training step of a split Llama under `case` against the same step of the unsplit one."""
    changes = dict(attention_dropout=0.0)
    stock, model = llama_pair(dtensor, **changes)
    ids, labels = families.batch()
    more, _ = families.batch(seed=8)

    def each(f):
        f(stock), f(model)

    if case.startswith("checkpointing"):
        each(
            lambda m: (
                m.train(),
                m.gradient_checkpointing_enable(dict(use_reentrant=case.endswith("reentrant"))),
            )
        )
        if case.endswith(" reentrant"):
            each(lambda m: m.enable_input_require_grads())
    if case == "frozen weights":
        each(
            lambda m: [
                p.requires_grad_("up_proj" in n or "embed" in n) for n, p in m.named_parameters()
            ]
        )
    if case == "frozen input":
        each(
            lambda m: [
                p.requires_grad_("layers.1" in n and "proj" in n) for n, p in m.named_parameters()
            ]
        )
    if case == "deepcopy":
        model = copy.deepcopy(model)

    def step(m):
        loss = m(ids, labels=labels).loss
        if case == "two graphs":
            loss = loss + m(more, labels=more).loss
        if case == "two graphs backward in turn":
            other = m(more, labels=more).loss
            loss.backward()
            other.backward()
            return
        if case == "retain_graph":
            loss.backward(retain_graph=True)
        loss.backward()

    with tpk.log_collectives() as log:
        step(model)
    step(stock)
    assert_same_grads(stock, model)
    blocks = 2
    wanted = {
        "two graphs": 4,
        "two graphs backward in turn": 4,
        "retain_graph": 4,
        "frozen input": None,
    }.get(case, 2)
    backward = sum(c.tag == "column_backward" for c in log)
    # Nothing before layer 1 needs a gradient: its attention's input does not, its MLP's does.
    assert backward == (wanted * blocks if wanted else 1)
    for module in model.modules():
        if getattr(module, "region", None) is not None:
            assert (
                module.region.input is None and not module.region.outputs
            )  # nothing is kept alive


@pytest.mark.parametrize(
    "case",
    [
        "plain",
        "checkpointing non-reentrant",
        "checkpointing reentrant",
        "two graphs",
        "two graphs backward in turn",
        "retain_graph",
        "frozen weights",
        "frozen input",
        "deepcopy",
    ],
)
def test_siblings_share_one_all_reduce(pool, case):
    pool.run(2, runs, case, True)


class Lora(nn.Module):
    """A low-rank update around a column layer, of its own output features."""

    def __init__(self, base, width, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.base = base
        self.down = nn.Parameter(torch.randn(4, 72, generator=generator) * 0.1, requires_grad=False)
        self.up = nn.Parameter(
            torch.randn(width, 4, generator=generator) * 0.1, requires_grad=False
        )

    def forward(self, x):
        return self.base(x * 1.0) + F.linear(F.linear(x.detach(), self.down), self.up)


class Attention(nn.Module):
    """Attention as a user writes it: names of its own, keys and values from another input if there is one."""

    def __init__(self, skip=False):
        super().__init__()
        self.num_heads, self.head_dim, self.skip = 9, 8, skip
        self.wq, self.wk, self.wv, self.extra = (
            nn.Linear(72, 72, bias=b) for b in (True, False, True, False)
        )
        self.wo = nn.Linear(72, 72)

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        q, k, v = (
            layer(t).view(*t.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)
            for layer, t in ((self.wq, x), (self.wk, memory), (self.wv, memory))
        )
        if not self.skip:
            q = q + self.extra(x).view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)
        return self.wo(
            F.scaled_dot_product_attention(q, k, v, is_causal=x.shape == memory.shape)
            .transpose(1, 2)
            .flatten(2)
        )


class Quantised(nn.Linear):
    def forward(self, x):
        return super().forward(x).round()


PLAN = {"wq": "colwise", "wk": "colwise", "wv": "colwise", "extra": "colwise", "wo": "rowwise"}


def own_attention(case, wanted):
    torch.manual_seed(0)
    stock = Attention(skip=case == "skipped sibling")
    model = tpk.parallelize(copy.deepcopy(stock), dist.group.WORLD, PLAN, dtensor=False)
    generator = torch.Generator().manual_seed(1)
    x, memory = (
        torch.randn(2, 5, 72, generator=generator),
        torch.randn(2, 7, 72, generator=generator),
    )
    inputs = [x, memory] if case == "cross-attention" else [x]
    if case == "wrapped sibling":
        first = sum(model.wk.out_spec.shard_sizes[: dist.get_rank()])
        stock.wk = Lora(stock.wk, 72, 3)
        wrapped = Lora(model.wk, 72, 3)
        wrapped.up = nn.Parameter(
            wrapped.up[first : first + model.wk.out_spec.shard_sizes[dist.get_rank()]],
            requires_grad=False,
        )
        model.wk = wrapped
    if case == "hooked sibling":
        model.wv.register_forward_pre_hook(lambda module, args: (args[0] * 1.0,))
    mine, theirs = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    with tpk.log_collectives() as log:
        y = model(*mine)
        y.square().sum().backward()
    want = stock(*theirs)
    want.square().sum().backward()
    assert (y - want).abs().max() < 1e-4 * want.abs().max()
    for a, b in zip(mine, theirs, strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-4 * b.grad.abs().max()
    assert sum(c.tag == "column_backward" for c in log) == wanted
    if case != "wrapped sibling":
        assert_same_grads(stock, model, 1e-4)


@pytest.mark.parametrize(
    "case, wanted",
    [
        ("one input", 1),
        ("cross-attention", 3),
        ("skipped sibling", 1),
        ("wrapped sibling", 2),
        ("hooked sibling", 4),
    ],
)
def test_siblings_that_do_not_share_stay_right(pool, case, wanted):
    pool.run(2, own_attention, case, wanted)


def inference():
    stock, model = llama_pair()
    ids, _ = families.batch()
    with torch.inference_mode():
        assert (model(ids).logits - stock(ids).logits).abs().max() < 1e-3
    model(ids, labels=ids).loss.backward()
    stock(ids, labels=ids).loss.backward()
    assert_same_grads(stock, model)
    torch.manual_seed(5)
    options = dict(max_new_tokens=12, do_sample=True, top_k=50, pad_token_id=0, eos_token_id=None)
    sampled = model.generate(ids[:, :6], **options)
    everyone = [torch.empty_like(sampled) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, sampled)
    assert all(torch.equal(sampled, other) for other in everyone)
    torch.manual_seed(5)
    assert torch.equal(sampled, stock.generate(ids[:, :6], **options))


def test_inference_mode_and_sampling(pool):
    pool.run(2, inference)


def loss_parallel_logits():
    stock, model = llama_pair()
    ids, labels = families.batch()
    want = stock(ids, labels=labels)
    output = model(ids, labels=labels)
    assert isinstance(output.logits, DTensor) and output.logits.placements == (
        Shard(2),
    )  # the last dimension
    assert (output.logits.full_tensor() - want.logits).abs().max() < 1e-3
    loss, logits, *_ = model(ids, labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss) and isinstance(logits, DTensor)
    assert type(model(ids).logits) is torch.Tensor
    whole = tpk.parallelize(families.make("llama"), dist.group.WORLD, loss_parallel=False)
    output = whole(ids, labels=labels)
    assert type(output.logits) is torch.Tensor and abs(output.loss - want.loss) < 1e-4
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:]
    assert abs(model(ids, labels=labels, shift_labels=shifted).loss - want.loss) < 1e-4
    try:
        model(ids, labels=labels.clamp_min(-1) + 400)
    except IndexError as error:
        assert "331 classes" in str(error)
    assert model.lm_head.gather_output  # also after an error
    assert type(model(ids).logits) is torch.Tensor
    model.loss_function = None


def test_loss_parallel_logits(pool):
    pool.run(2, loss_parallel_logits)


class OwnLossHead(nn.Module):
    def __init__(self, stock):
        super().__init__()
        self.model, self.config = stock, stock.config
        self.get_output_embeddings, self.get_input_embeddings = (
            stock.get_output_embeddings,
            stock.get_input_embeddings,
        )

    def forward(self, ids, labels=None):
        logits = self.model(ids).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def head_with_its_own_loss():
    stock = families.make("llama")
    ids, _ = families.batch()
    model = OwnLossHead(copy.deepcopy(stock))
    plan = {f"model.{pattern}": style for pattern, style in stock._tp_plan.items()}
    tpk.parallelize(model, dist.group.WORLD, plan)
    assert abs(model(ids, labels=ids) - OwnLossHead(stock)(ids, labels=ids)) < 1e-4


def test_a_head_with_its_own_loss_gets_whole_logits(pool):
    pool.run(2, head_with_its_own_loss)


def representation(dtensor):
    stock, model = llama_pair(dtensor, tie_word_embeddings=True)
    names = {n: tuple(p.shape) for n, p in stock.named_parameters()}
    assert list(names) == [n for n, _ in model.named_parameters()]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(isinstance(p, DTensor) == dtensor for p in model.parameters())
    if dtensor:
        parameters = dict(model.named_parameters())
        assert parameters["model.norm.weight"].placements == (Replicate(),)
        assert parameters["model.layers.0.mlp.up_proj.weight"].shape == (150, 72)
        rows = {2: 2 * 48, 3: 72, 4: 4 * 24}[
            dist.get_world_size()
        ]  # of 8: 6 + 3 heads padded to 6 + 6, 3 + 3 + 3, 3 + 2 + 2 + 2 padded
        assert parameters["model.layers.0.self_attn.q_proj.weight"].shape == (rows, 72)
    # The round trip is exact, and what another TP size wrote can be read.
    state = tpk.unsharded_state_dict(model)
    want = stock.state_dict()
    assert list(state) == list(want) and all(torch.equal(state[k], want[k]) for k in want)
    other = families.make("llama", tie_word_embeddings=True)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    tpk.parallelize(other, dist.group.WORLD, dtensor=not dtensor)
    tpk.load_unsharded_state_dict(other, state)
    again = tpk.unsharded_state_dict(other, rank0_only=True, cpu_offload=True)
    assert (dist.get_rank() == 0) == bool(again)
    assert all(torch.equal(again[k], want[k]) for k in again)
    broken = {**state, "extra": torch.zeros(1)}
    del broken["model.norm.weight"]
    with pytest.raises(KeyError, match=r"model\.norm\.weight.*extra"):
        tpk.load_unsharded_state_dict(other, broken)
    tpk.load_unsharded_state_dict(other, broken, strict=False)
    with pytest.raises(ValueError, match="unsharded model's"):
        tpk.load_unsharded_state_dict(other, {**state, "model.norm.weight": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="unsharded_state_dict"):
        model.save_pretrained("anywhere")
    return state


@pytest.mark.parametrize("dtensor", [True, False])
def test_names_ties_and_state(pool, dtensor):
    states = [pool.run(ranks, representation, dtensor)[0] for ranks in (2, 3, 4)]
    assert all(torch.equal(states[0][k], other[k]) for other in states[1:] for k in other)


def one_rank():
    stock, model = llama_pair()
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    ids, labels = families.batch()
    with tpk.log_collectives() as log:
        model(ids, labels=labels).loss.backward()
    stock(ids, labels=labels).loss.backward()
    assert not log
    assert_same_grads(stock, model, 1e-6)
    state = tpk.unsharded_state_dict(model)
    assert all(torch.equal(state[k], v) for k, v in stock.state_dict().items())
    tpk.load_unsharded_state_dict(model, state)


def test_one_rank_keeps_plain_parameters(pool):
    pool.run(1, one_rank)


def plan_errors():
    def refuses(plan, *words, model=None, **options):
        model = model if model is not None else families.make("llama")
        before = {n: p.shape for n, p in model.named_parameters()}
        with tpk.log_collectives() as log, pytest.raises(ValueError) as error:
            tpk.parallelize(model, dist.group.WORLD, plan, **options)
        assert all(word in str(error.value) for word in words), error.value
        assert (
            before == {n: p.shape for n, p in model.named_parameters()} and not log
        )  # nothing has changed

    refuses(
        {"model.layers.*.self_attn.q": "colwise"},
        "matches no module",
        "model.layers.*.self_attn.q_proj",
    )
    refuses({"model.layers.*.mlp.up_proj": "columnwise"}, "columnwise", *STYLES)
    refuses({"model.norm": "colwise"}, "LlamaRMSNorm", "nn.Linear")
    refuses({"model.layers.*.mlp.up_proj": "embedding_rowwise"}, "nn.Embedding")
    sparse = nn.Sequential(nn.Linear(8, 6), nn.Embedding(9, 8, sparse=True))
    refuses({"0": "colwise", "1": "embedding_rowwise"}, "sparse=True", model=sparse)
    refuses({"0": "colwise"}, "Quantised", model=nn.Sequential(Quantised(8, 6)))
    refuses("guess", "'guess'")
    refuses("auto", "overlap", overlap=True)
    refuses(
        {"0": "colwise", "1": "rowwise"},
        "cannot be sharded alike",
        model=nn.Sequential(nn.Linear(8, 6), nn.Linear(8, 8)),
    )
    refuses(
        {"model.embed_tokens": "embedding_rowwise", "lm_head": "replicate"},
        "tied",
        model=families.make("llama", tie_word_embeddings=True),
    )
    refuses("auto", "carries no tensor-parallel plan", model=nn.Sequential(nn.Linear(2, 2)))
    attention = {k: v for k, v in PLAN.items() if k != "extra"}
    refuses(attention, "extra", "replicated_with_grad_allreduce", model=Attention())
    model = Attention()
    model.sink = nn.Parameter(torch.zeros(9))
    refuses(PLAN, "sink", model=model)
    refuses({**PLAN, "wk": "packed_qkv_colwise"}, "wk", "whole heads", model=Attention())
    split = tpk.parallelize(families.make("llama"), dist.group.WORLD)
    refuses("auto", "already", model=split)
    if dist.get_world_size() > 2:
        small = families.make("llama", num_attention_heads=2, num_key_value_heads=1)
        refuses("auto", "2 attention heads", f"{dist.get_world_size()} ranks", model=small)


def test_plan_errors(pool):
    pool.run(3, plan_errors)


def extended_plan():
    stock = families.make("llama")
    plan = {
        **tpk.auto_plan(stock),
        "model.layers.1.mlp.*": "replicate",
        "model.embed_tokens": "replicate",
    }
    model = tpk.parallelize(copy.deepcopy(stock), dist.group.WORLD, plan)
    assert type(model.model.layers[0].mlp.up_proj) is tpk.nn.ColumnParallelLinear
    ids, labels = families.batch()
    model(ids, labels=labels).loss.backward()
    stock(ids, labels=labels).loss.backward()
    assert_same_grads(stock, model)


def test_a_plan_can_be_extended(pool):
    pool.run(2, extended_plan)


def compiled():
    stock, model = llama_pair()
    ids, labels = families.batch()
    torch.compile(model, backend="aot_eager")(ids, labels=labels).loss.backward()
    stock(ids, labels=labels).loss.backward()
    assert_same_grads(stock, model)
    torch.manual_seed(0)
    mlp, x = (
        tpk.nn.ParallelMLP(8, 24, activation="swiglu", group=dist.group.WORLD),
        torch.randn(6, 8, requires_grad=True),
    )
    torch.compile(mlp, backend="aot_eager", fullgraph=True)(x).sum().backward()
    grads = [x.grad, *(p.grad for p in mlp.parameters())]
    for tensor in (x, *mlp.parameters()):
        tensor.grad = None
    mlp(x).sum().backward()
    assert all(
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(grads, (x.grad, *(p.grad for p in mlp.parameters())), strict=True)
    )


def test_torch_compile(pool):
    """A whole model with graph breaks at its hooks, an MLP of ours without any."""
    pool.run(2, compiled)


def other_heads():
    import transformers

    ids, _ = families.batch()
    labels = torch.tensor([0, 1])
    for name, options in (
        ("LlamaModel", {}),
        ("GPT2Model", {}),
        ("LlamaForSequenceClassification", dict(labels=labels)),
    ):
        config = families.make("gpt2" if "GPT2" in name else "llama").config
        torch.manual_seed(0)
        stock = getattr(transformers, name)(config).eval()
        model = tpk.parallelize(copy.deepcopy(stock), dist.group.WORLD)
        assert any(isinstance(m, tpk.nn.ColumnParallelLinear) for m in model.modules())
        with torch.no_grad():
            for mine, want in zip(
                model(ids, **options)[:2], stock(ids, **options)[:2], strict=True
            ):
                if torch.is_tensor(mine):  # not the KV cache, which is split
                    assert (mine - want).abs().max() < 1e-5


def test_base_models_and_classifiers(pool):
    """Nothing to split behind the last block, and a loss of their own."""
    pool.run(2, other_heads)


def tiny_vocabulary():
    stock, model = llama_pair(vocab_size=5, pad_token_id=None)  # 2 + 2 + 1 + 0 on 4 ranks
    ids = torch.randint(0, 5, (2, 7), generator=torch.Generator().manual_seed(0))
    loss, want = model(ids, labels=ids).loss, stock(ids, labels=ids).loss
    assert abs(loss - want) < 1e-5 * want
    loss.backward()
    want.backward()
    assert_same_grads(stock, model)
    with torch.no_grad():
        assert (model(ids).logits - stock(ids).logits).abs().max() < 1e-4


def test_a_rank_without_any_of_the_vocabulary(pool):
    pool.run(4, tiny_vocabulary)
