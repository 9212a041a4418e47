"""What a sequence spread over devices costs, counted in the compiled programs of an 8-device mesh with `seq` alone.

Only the global model gathers. The local model is without communication, but for what its options ask of the
neighbour: r slots for cross-patch attention. Where results are right is tested elsewhere; here only what is moved.
"""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from megabyte_jax.config import Config, DataConfig, Level, MegabyteConfig, MeshConfig, OptimizerConfig
from megabyte_jax.data.batches import batches
from megabyte_jax.data.open_data import open_source
from megabyte_jax.models.build import abstract_model, parameter_info
from megabyte_jax.models.loss import byte_nats, sum_of_nats
from megabyte_jax.parallel.sharding import batch_sharding, make_mesh, shard_abstract
from megabyte_jax.planning.collectives import collectives
from megabyte_jax.planning.lowering import lower
from megabyte_jax.training.state import abstract_state, initial_state, make_train_step

DEVICES = 8
LAYERS = 2
P, PATCHES = 8, 32
GLOBAL = {"patch_size": P, "width": 32, "num_layers": LAYERS, "num_heads": 4}  # 8 channels a head
LOCAL = {"patch_size": 1, "width": 16, "num_layers": LAYERS, "num_heads": 2}
GATHERS = {("all-gather", PATCHES * 32 * 4): 2 * LAYERS}  # k and v of the whole sequence, float32, in each layer
PATCH_SHIFT = {("collective-permute", 32 * 4): 1}

pytestmark = pytest.mark.usefixtures("devices", "full_compile")


@pytest.fixture
def devices():
  assert jax.device_count() == DEVICES


def model(r=0, conv=(), **options):
  levels = (Level(**GLOBAL, conv_filters=conv), Level(**LOCAL, cross_patch=r, rotary=r > 0))
  return MegabyteConfig(context=P * PATCHES, levels=levels, dropout=0.0, **options)


def seq_mesh():
  return make_mesh(MeshConfig(data=1, seq=DEVICES))


def compiled(config, function):
  """The collectives of function(model, x_BT), parameters and bytes laid out as in training."""
  mesh = seq_mesh()
  graph, parameters = abstract_model(config)
  x_BT = jax.ShapeDtypeStruct((1, config.context), jnp.uint8, sharding=batch_sharding(mesh))
  with jax.set_mesh(mesh):
    program = jax.jit(lambda parameters, x_BT: function(nnx.merge(graph, parameters), x_BT))
    return collectives(
      program.lower(shard_abstract(parameters, parameter_info(config), mesh), x_BT).compile().as_text()
    )


@functools.cache
def forward(config):
  return compiled(config, lambda model, x_BT: model(x_BT))


@functools.cache
def backward(config):
  def gradient(model, x_BT):
    graph, parameters = nnx.split(model)
    return jax.grad(lambda parameters: byte_nats(nnx.merge(graph, parameters), x_BT)[0].sum())(parameters)

  return compiled(config, gradient)


def count(found):
  """(kind, bytes of an array) -> how often, every array by itself."""
  total = Counter()
  for one in found:
    for size in one.arrays:
      total[one.kind, size] += one.times
  return dict(total)


def test_forward_has_only_the_global_models_gathers_and_the_patch_shift():
  assert count(forward(model())) == {**GATHERS, **PATCH_SHIFT}


def test_local_model_alone_has_no_communication():
  mesh = seq_mesh()
  config = model()

  def local(model, x_BT):
    parent_BNP = jax.lax.with_sharding_constraint(
      jnp.ones((1, PATCHES, GLOBAL["width"])), jax.sharding.PartitionSpec(None, "seq")
    )
    h_BNMD, _ = model.levels[1](x_BT, parent_BNP)
    return model.levels[1].embedder.logits(h_BNMD)

  assert mesh.shape["seq"] == DEVICES
  assert compiled(config, local) == []


@pytest.mark.parametrize("r", [3, P])
def test_cross_patch_attention_permutes_r_keys_and_values_a_layer(r):
  r_slots = ("collective-permute", r * LOCAL["width"] * 4)
  assert count(forward(model(r=r))) == {**GATHERS, **PATCH_SHIFT, r_slots: 2 * LAYERS}


def test_convolutional_encoder_permutes_once_a_layer():
  found = count(forward(model(conv=(3, 5, 7))))
  halos = {("collective-permute", (size - 1) * 4 * 4): 1 for size in (3, 5, 7)}  # size - 1 bytes of 4 channels
  assert found == {**GATHERS, **PATCH_SHIFT, **halos}


@pytest.mark.slow
def test_backward_adds_transposes_and_the_parameters_all_reduce():
  r = 3
  config = model(r=r)
  forward_only, both = forward(config), backward(config)
  kinds = Counter()
  for one in both:
    kinds[one.kind] += len(one.arrays) * one.times
  moved = {size: times for (kind, size), times in count(both).items() if kind == "collective-permute"}
  assert moved == {size: 2 * n for (kind, size), n in count(forward_only).items() if kind == "collective-permute"}
  # k and v are gathered again for the gradients of queries and probabilities; their own are summed over devices.
  assert kinds["all-gather"] == 4 * LAYERS
  assert set(kinds) == {"all-gather", "collective-permute", "all-reduce"}
  # Every parameter of a stack is a slice of L layers: summed within the loop; those outside of it once.
  parameters = jax.tree.leaves(abstract_model(config)[1])
  summed = sum(size * one.times for one in both if one.kind == "all-reduce" for size in one.arrays)
  keys_and_values = 2 * LAYERS * PATCHES * GLOBAL["width"] * 4
  assert summed == pytest.approx(keys_and_values + sum(4 * p.size for p in parameters), rel=0.15)


@pytest.mark.parametrize("groups", [1, 4])
def test_gradients_are_summed_once_however_many_groups_of_patches_there_are(groups):
  config = model(patch_groups=groups)

  def gradient(model, x_BT):
    graph, parameters = nnx.split(model)
    return jax.grad(lambda parameters: sum_of_nats(nnx.merge(graph, parameters), x_BT)[0])(parameters)

  summed = sum(
    size * one.times for one in compiled(config, gradient) if one.kind == "all-reduce" for size in one.arrays
  )
  keys_and_values = 2 * LAYERS * PATCHES * GLOBAL["width"] * 4
  parameters = sum(4 * p.size for p in jax.tree.leaves(abstract_model(config)[1]))
  assert summed == pytest.approx(keys_and_values + parameters, rel=0.15)


@pytest.mark.slow
def test_a_training_step_leaves_the_state_where_it_was():
  """Otherwise the second step is compiled again, for other shardings."""
  config = Config(model=model(), batch_size=1, num_steps=2, mesh=MeshConfig(data=1, seq=DEVICES))
  mesh = seq_mesh()
  compiled_step = lower(config, mesh, "train").compile()
  after, _ = compiled_step.output_shardings
  before = abstract_state(config, mesh)
  for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
    assert a.is_equivalent_to(b.sharding, b.ndim), (a, b.sharding)


def test_parse_collectives():
  text = """HloModule a
%body (p: f32[4]) -> f32[4] {
  %rs = f32[4]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, to_apply=%add, metadata={op_name="x/y"}
  %before = s32[]{:T(128)} get-tuple-element(%p), index=1
  %two = s32[]{:T(128)} constant(2)
  %after = s32[]{:T(128)} add(%before, %two)
  ROOT %tuple = (f32[4]{0}, s32[]{:T(128)}) tuple(%rs, %after)
}
%cond (p: f32[4]) -> pred[] {
  %counter = s32[]{:T(128)} get-tuple-element(%p), index=1
  %limit = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}
ENTRY %main (a: f32[4]) -> f32[4] {
  %ag = (bf16[2,8]{1,0:T(8,128)}, bf16[8,8]{1,0}) all-gather-start(%a), replica_groups=[2,4]<=[8], dimensions={0}
  %one = f32[9] all-reduce(%a), replica_groups=mesh['x'=4,'y'=2] {}, to_apply=%add
  %split = f32[16] all-reduce(%a), replica_groups=mesh['x'=4,'y'=2] {'x':(1)2,'y'}, to_apply=%add
  %w = f32[4] while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"12"}}
}
"""
  assert collectives(text.replace(', backend_config={"known_trip_count":{"n":"12"}}', ""))[0].times == 4  # 0, 2, 4, 6
  found = {one.kind: one for one in collectives(text)}
  assert len(collectives(text)) == 3
  assert found["reduce-scatter"].times == 12
  assert found["reduce-scatter"].name == "x/y"
  assert found["reduce-scatter"].wire_bytes == 12 * 4 * 4 * 3  # each device starts from 4 parts and sends 3
  assert found["all-gather"].arrays == (128,)
  assert found["all-gather"].wire_bytes == 128 * 3 / 4
  assert found["all-reduce"].group == 4


@pytest.mark.parametrize(
  ("start", "arrays", "sends"),
  [
    ("bf16[8,4]{1,0} all-reduce-start(%a)", (64,), 64),  # JAX 0.10.2
    ("(f32[8]{0}, f32[2]{0}) all-reduce-start(%a, %b)", (32, 8), 40),
    ("((bf16[8,4]{1,0:T(8,128)}), bf16[8,4]{1,0}) all-reduce-start(%a)", (64,), 64),  # JAX 0.11.2
    ("((f32[8]{0}, f32[2]{0}), (f32[8]{0}, f32[2]{0})) all-reduce-start(%a, %b)", (32, 8), 40),
    ("((f32[4]{0}, f32[1]{0}), (f32[8]{0}, f32[2]{0})) all-gather-start(%a, %b)", (32, 8), 20),
    ("((f32[8]{0}), f32[4]{0}) reduce-scatter-start(%a)", (32,), 16),
    ("((f32[8]{0}), f32[8]{0}) all-to-all-start(%a)", (32,), 16),
    ("(f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%a)", (32,), 32),
    ("((f32[8]{0}, f32[2]{0}), (f32[8]{0}, f32[2]{0})) collective-permute-start(%a, %b)", (32, 8), 40),
  ],
)
def test_a_start_counts_its_results_alone(start, arrays, sends):
  [one] = collectives(f"ENTRY %main (a: f32[4]) -> f32[4] {{\n  %s = {start}, replica_groups={{{{0,1}}}}\n}}\n")
  assert (one.arrays, one.wire_bytes) == (arrays, sends)


def test_collectives_spread_over_fusions_count_once():
  gather = 'all-gather(%p), channel_id={}, replica_groups=[2,4]<=[8], frontend_attributes={{chain_id="{}"}}'
  text = f"""HloModule a
%start (p: f32[4]) -> f32[16] {{
  %ag1 = f32[16] {gather.format(7, 0)}
}}
%within (p: f32[4]) -> f32[16] {{
  %ag2 = f32[16] {gather.format(7, 0)}
}}
%other (p: f32[4]) -> f32[16] {{
  %ag3 = f32[16] {gather.format(8, 1)}
}}
%body (p: f32[4]) -> f32[4] {{
  %f2 = f32[16] fusion(%p), calls=%within
}}
%cond (p: f32[4]) -> pred[] {{
  ROOT %lt = pred[] compare(%p, %p), direction=LT
}}
ENTRY %main (a: f32[4]) -> f32[4] {{
  %w = f32[4] while(%a), condition=%cond, body=%body, backend_config={{"known_trip_count":{{"n":"4"}}}}
  %f1 = f32[16] fusion(%w), calls=%start
  %f3 = f32[16] fusion(%w), calls=%other
}}
"""
  assert [(one.kind, one.times) for one in collectives(text)] == [("all-gather", 1)] * 2


@pytest.mark.parametrize(
  ("kind", "slices", "shape", "sends"),
  [
    ("ALL_REDUCE", "1,2", "(bf16[2,8]{1,0:T(8,128)(2,1)}, u32[], token[])", 32.0),
    ("ALL_REDUCE", "1:4", "(f32[16]{0}, f32[16]{0}, u32[], token[])", 192.0),
    ("ALL_GATHER", "1,2,3,4", "(f32[16]{0}, u32[], token[])", 192.0),
  ],
)
def test_what_goes_between_slices(kind, slices, shape, sends):
  attributes = f'_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{{{slices}}}x{{0:3}}"'
  text = f"""ENTRY %main (a: f32[4]) -> f32[4] {{
  %s = {shape} send(%a, %t), channel_id=2, frontend_attributes={{{attributes},_xla_megascale_transfer_type="{kind}"}}
  %r = {shape} recv(%t), channel_id=1, frontend_attributes={{{attributes},_xla_megascale_transfer_type="{kind}"}}
}}
"""
  [one] = collectives(text)
  assert one.between_slices
  assert one.wire_bytes == sends


@pytest.mark.slow
def test_image640_trains_with_its_sequence_spread(tmp_path):
  """1,228,800 bytes in patches of 192, Table 5's longest, with a tiny model; on one device, too."""
  photograph = np.random.default_rng(0).integers(0, 256, (640, 640, 3), np.uint8)
  for name in "ab":
    Image.fromarray(photograph if name == "a" else photograph[::-1]).save(tmp_path / f"{name}.png")
  data = DataConfig(train=str(tmp_path), validation="", form="image", image_size=640, scan_patch=192)
  levels = (
    Level(patch_size=192, width=192, num_layers=1, num_heads=2),
    Level(patch_size=1, width=8, num_layers=1, num_heads=1),
  )
  config = Config(
    model=MegabyteConfig(context=1_228_800, levels=levels, dropout=0.0, remat="full"),
    data=data,
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0),
    batch_size=1,
    num_steps=2,
  )

  def losses(mesh):
    state, train_step = initial_state(config, mesh), make_train_step(config)
    found = []
    with jax.set_mesh(mesh):
      for _, batch in batches(
        open_source(data, "train"),
        batch_size=1,
        context=config.model.context,
        seed=0,
        num_steps=2,
        sharding=batch_sharding(mesh),
      ):
        state, values = train_step(state, batch.x_BT, None)
        found.append(float(values["nats"]) / float(values["bytes"]))
    return found

  spread = losses(seq_mesh())
  assert np.isfinite(spread).all() and spread[1] != spread[0]
  assert spread == pytest.approx(losses(make_mesh(MeshConfig(data=1), jax.devices()[:1])), rel=1e-5)
