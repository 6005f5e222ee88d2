"""Batches: which examples in which order, restarts, broken files, and shards."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from finelip_fast.datasets import Example, Region
from finelip_fast.errors import ConfigError, TrainingError
from finelip_fast.preprocess import Preprocess
from finelip_fast.tokenizer import token_spans, tokenize
from finelip_fast.training.augment import Augmentation
from finelip_fast.training.batch import collate, encode_example
from finelip_fast.training.data import TrainingData
from finelip_fast.training.pairs import Encoded, GroupedSampler

CONTEXT = 12
PREPROCESS = Preprocess(8)
WORDS = ["red", "green", "blue", "dark", "round", "small", "tall"]


def picture(index):
    return Image.new("RGB", (8, 8), (index, 255 - index, 7 * index % 256))


def caption(index):
    """Return a caption of 1 to 7 words, unique for each index."""
    return " ".join([str(index), *WORDS[: index % 7]])


class Pairs:
    """Pictures in memory; those in `broken` are unreadable."""

    def __init__(self, size, broken=()):
        self.size, self.broken = size, broken

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        image = f"pictures/{index}.png" if index in self.broken else picture(index)
        return Example(image, caption(index), str(index))


@cache
def identities():
    """Return a mapping from picture ids to examples."""
    examples = [Example(picture(0), "a", str(index)) for index in range(64)]
    return {encode_example(example, PREPROCESS, CONTEXT).image_id: int(example.image_id) for example in examples}


def members(batch):
    """Return the indices of a batch's examples, determined from their picture ids."""
    return [identities()[image_id] for image_id in batch.image_ids.tolist()]


def flat(lists):
    return [item for items in lists for item in items]


def take(data, count):
    batches = iter(data)
    return [next(batches) for _ in range(count)]


def assert_same_batches(first, second):
    assert len(first) == len(second)
    for batch, expected in zip(first, second, strict=True):
        assert torch.equal(batch.pixels, expected.pixels)
        assert torch.equal(batch.ids, expected.ids)
        assert torch.equal(batch.image_ids, expected.image_ids)
        assert batch.broken == expected.broken


def stream(size=22, batch_size=4, position=0, **options):
    data = TrainingData(Pairs(size), PREPROCESS, CONTEXT, batch_size=batch_size, **options)
    data.skip(position)
    return data


# --- Order -------------------------------------------------------------------------------------------------------


def sampled(size, batch_size, world=1, epoch=0, **options):
    """Return each process's batches of an epoch."""
    shares = []
    for rank in range(world):
        sampler = GroupedSampler(size, batch_size, **({"group": 1, "seed": 5} | options), rank=rank, world=world)
        sampler.epoch = epoch
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler)
    return shares


@given(
    group=st.integers(1, 4),
    groups_in_batch=st.integers(1, 3),
    world=st.sampled_from([1, 2, 4]),
    extra=st.integers(0, 40),
    epoch=st.integers(0, 3),
)
def test_an_epoch_is_whole_groups_once_each_whatever_the_number_of_processes(
    group, groups_in_batch, world, extra, epoch
):
    batch_size = group * groups_in_batch
    size = batch_size * 4 + extra
    shares = sampled(size, batch_size * 4 // world, world, epoch, group=group)
    batches = [flat(parts) for parts in zip(*shares, strict=True)]
    assert batches == sampled(size, batch_size * 4, epoch=epoch, group=group)[0]
    assert len(batches) == size // (batch_size * 4)
    drawn = [index for batch in batches for index in batch]
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(range(size))
    for parts in shares:
        for batch in parts:
            first = batch[::group]
            assert all(index % group == 0 for index in first)
            assert batch == [index + step for index in first for step in range(group)]


def test_epochs_and_seeds_differ_and_are_repeatable():
    epochs = [sampled(40, 4, epoch=epoch)[0] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert all(sorted(flat(epoch)) == list(range(40)) for epoch in epochs)
    assert sampled(40, 4, epoch=1)[0] == epochs[1]
    assert sampled(40, 4, epoch=1, seed=6)[0] != epochs[1]


@pytest.mark.parametrize("seed", [0, 5, -5, 1 << 62, -(1 << 62), (1 << 63) - 1])
def test_any_seed_of_a_configuration_gives_an_order(seed):
    (batches,) = sampled(40, 4, epoch=1, seed=seed)
    assert sorted(flat(batches)) == list(range(40))
    if abs(seed) < 1 << 32:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + 1)
        assert flat(batches) == torch.randperm(40, generator=generator).tolist()


def test_refuses_a_batch_that_breaks_groups_or_exceeds_the_data():
    with pytest.raises(ConfigError, match="expected batch_size a multiple of group=4, got 6"):
        GroupedSampler(100, 6, group=4, seed=0, rank=0, world=1)
    with pytest.raises(ConfigError, match="expected at least one global batch of 8 examples, got 7"):
        GroupedSampler(7, 4, group=1, seed=0, rank=0, world=2)


# --- The stream --------------------------------------------------------------------------------------------------


def test_the_stream_is_epoch_after_epoch():
    data = stream()
    assert data.epoch_batches == 5
    batches = [members(batch) for batch in take(data, 11)]
    expected = [batch for epoch in range(3) for batch in sampled(22, 4, epoch=epoch, seed=0)[0]]
    assert batches == expected[:11]
    assert data.state_dict() == {"epoch": 2, "pairs": 4}


@pytest.mark.parametrize("position", [1, 4, 5, 6, 10])
def test_a_restart_goes_on_exactly(position):
    assert_same_batches(take(stream(position=position), 4), take(stream(), position + 4)[position:])


def test_processes_share_the_global_batch():
    shares = [take(stream(batch_size=2, rank=rank, world=2), 12) for rank in (0, 1)]
    together = [members(first) + members(second) for first, second in zip(*shares, strict=True)]
    assert together == [members(batch) for batch in take(stream(), 12)]


def test_the_number_of_workers_changes_nothing():
    in_this_process = take(stream(group=2, position=3), 5)
    assert_same_batches(take(stream(group=2, position=3, workers=1), 5), in_this_process)


# --- One batch ---------------------------------------------------------------------------------------------------


def test_an_example_becomes_pixels_ids_and_a_picture_id():
    encoded = encode_example(Pairs(9)[5], PREPROCESS, CONTEXT)
    assert torch.equal(encoded.pixels, PREPROCESS(picture(5)))
    assert torch.equal(encoded.ids, tokenize(caption(5), CONTEXT)[0])
    assert 0 <= encoded.image_id < 2**63
    image_ids = {
        encode_example(example, PREPROCESS, CONTEXT).image_id for example in map(Pairs(9).__getitem__, range(9))
    }
    assert len(image_ids) == 9
    assert encoded.image_id == encode_example(Example(picture(1), "another caption", "5"), PREPROCESS, CONTEXT).image_id


def test_a_long_caption_is_cut_without_a_warning_for_each():
    long = encode_example(Example(picture(1), "word " * 50, "1"), PREPROCESS, CONTEXT)
    assert long.ids.count_nonzero() == CONTEXT
    short = encode_example(Pairs(9)[5], PREPROCESS, CONTEXT)
    assert collate([long, short, long]).captions_cut == 2


PHRASES = Example(
    picture(1),
    "A dark river. Small trees, tall trees and a house.",
    "1",
    (
        Region(0, 12, (0.0, 0.5, 1.0, 1.0), "river"),
        Region(14, 25, (0.0, 0.0, 0.5, 0.5), "trees"),
        Region(42, 49, (0.5, 0.0, 1.0, 0.5), "house"),
    ),
)


def test_phrases_come_as_the_tokens_and_the_places_they_were_given():
    encoded = encode_example(PHRASES, PREPROCESS, 32)
    for (first, last), region in zip(encoded.spans.tolist(), PHRASES.regions, strict=True):
        phrase = tokenize(PHRASES.caption[region.start : region.end], 32)[0]
        assert encoded.ids[first:last].tolist() == phrase[phrase > 0][1:-1].tolist()
    assert encoded.boxes.tolist() == [list(region.box) for region in PHRASES.regions]


def test_phrases_that_the_context_cuts_are_left_out():
    complete, cut = (encode_example(PHRASES, PREPROCESS, length) for length in (32, 8))
    assert complete.spans[1, 1] == 7  # its last token comes just before the end token in a context of 8
    assert torch.equal(cut.spans, complete.spans[:2])
    assert torch.equal(cut.boxes, complete.boxes[:2])
    assert len(encode_example(PHRASES, PREPROCESS, 7).spans) == 1


def test_parts_are_sentences_and_the_phrases_of_those_that_have_several():
    caption = "A red house stands 3.5 m left, with a blue door. A man waits!  Rain"
    example = Example(picture(1), caption, "1")
    encoded = encode_example(example, PREPROCESS, 32)
    words = {text: caption.index(text) for text in (caption[:48], "A red house stands 3.5 m left", "with a blue door.")}
    words |= {"A man waits!": 49, "Rain": 63}
    stretches = [(start, start + len(text)) for text, start in words.items()]
    assert encoded.parts.tolist() == [list(span) for span in token_spans(caption, stretches)]
    assert len(encode_example(example, PREPROCESS, 12).parts) == 1
    assert collate([encoded, encoded]).part_owners.tolist() == [0] * 5 + [1] * 5


def test_a_batch_tells_which_pair_a_phrase_belongs_to():
    pairs = [PHRASES._replace(regions=PHRASES.regions[:count]) for count in (2, 0, 3)]
    encoded = [encode_example(pair, PREPROCESS, 32) for pair in pairs]
    batch = collate(encoded)
    assert batch.owners.tolist() == [0, 0, 2, 2, 2]
    assert torch.equal(batch.spans, torch.cat([example.spans for example in encoded]))
    assert torch.equal(batch.boxes, torch.cat([example.boxes for example in encoded]))
    river, trees, river_again, trees_again, house = batch.labels.tolist()
    assert (river, trees) == (river_again, trees_again)
    assert len({river, trees, house}) == 3
    assert collate(encoded[1:2]).spans.shape == (0, 2)
    doubled = batch.map(lambda tensor: tensor * 2)
    assert torch.equal(doubled.spans, 2 * batch.spans)
    assert doubled.broken == batch.broken


def test_ids_are_cut_to_the_longest_caption():
    data = Encoded(Pairs(22), PREPROCESS, CONTEXT)
    batch = collate([data[0], data[2], data[1]])
    longest = len(tokenize(caption(2), CONTEXT)[0].nonzero())
    assert batch.ids.shape == (3, longest)
    assert torch.equal(batch.ids, tokenize([caption(index) for index in (0, 2, 1)], CONTEXT)[:, :longest])
    assert batch.pixels.shape == (3, 3, 8, 8)
    assert batch.broken == []


def test_a_token_of_id_0_inside_a_caption_does_not_cost_its_end():
    ids = tokenize(["hi!(", "a"], CONTEXT)
    assert 0 in ids[0, :4]  # "!" without a following space is token 0, which is also the padding
    pairs = [Example(picture(0), text, "0") for text in ("hi!(", "a")]
    batch = collate([encode_example(pair, PREPROCESS, CONTEXT) for pair in pairs])
    assert torch.equal(batch.ids, ids[:, :5])


# --- Broken pictures ---------------------------------------------------------------------------------------------


def test_another_picture_takes_a_broken_ones_place():
    data = Encoded(Pairs(6, broken={2, 3, 5}), PREPROCESS, CONTEXT)
    for index in range(6):
        encoded = data[index]
        used = identities()[encoded.image_id]
        assert used in (0, 1, 4)
        assert used == index or index in (2, 3, 5)
        assert torch.equal(encoded.pixels, PREPROCESS(picture(used)))
        assert bool(encoded.broken) == (used != index)
        assert all(f"pictures/{number}.png" in encoded.broken[0] for number in [index] if encoded.broken)
    batch = collate([data[2], data[0], data[5]])
    assert len(batch) == 3
    assert len(batch.broken) >= 2


@pytest.mark.parametrize("first", [0, 300])
def test_a_part_of_the_data_that_is_missing_is_left_out_evenly(first):
    """ShareGPT4V without its largest part, for example, lacks more in a row than are ever tried in turn."""
    size, missing = 1000, range(first, first + 500)
    data = Encoded(Pairs(size, broken=missing), Preprocess(2), 3, max_broken_share=0.6)
    used = [data[index] for index in missing]
    assert max(len(encoded.broken) for encoded in used) < 10
    counts = torch.tensor([encoded.image_id for encoded in used]).unique(return_counts=True)[1]
    assert counts.max() <= 5


def test_a_caption_that_is_none_counts_as_broken():
    pairs = [Example(picture(0), text, f"{text[:9]!r}") for text in ("", " \n", "a" * 300_000, "a cat")]
    (broken,) = {encoded.broken[0] for encoded in [Encoded([pairs[0], pairs[3]], PREPROCESS, CONTEXT)[0]]}
    assert broken == "'': expected a caption, got none"
    assert len(Encoded(pairs, PREPROCESS, CONTEXT)[1].broken) >= 1
    assert Encoded(pairs[2:], PREPROCESS, CONTEXT)[0].broken[0].startswith("'aaaaaaaaa': expected texts of at most")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_without_any_picture_is_refused_in_a_line(workers):
    data = TrainingData(Pairs(4, broken=range(4)), PREPROCESS, CONTEXT, batch_size=2, workers=workers)
    expected = r"^none of the 4 pairs tried, of 4, can be read; the last: .*pictures/\d\.png.*; .*pass --root, .*$"
    with pytest.raises(TrainingError, match=expected):
        next(iter(data))


@pytest.mark.parametrize(("share", "tried"), [(0.01, 100), (0.9, 263), (1.0, 400)])
def test_the_search_for_another_picture_ends_by_the_share_that_may_be_broken(share, tried):
    data = Encoded(Pairs(400, broken=range(400)), PREPROCESS, CONTEXT, max_broken_share=share)
    with pytest.raises(TrainingError, match=f"none of the {tried} pairs tried, of 400, can be read"):
        data[7]


class Dying(Pairs):
    def __getitem__(self, index):
        os._exit(1)


def test_a_worker_that_is_ended_is_an_error_of_one_line():
    data = TrainingData(Dying(4), PREPROCESS, CONTEXT, batch_size=2, workers=1)
    with pytest.raises(TrainingError, match=r"^the system ended a data loading process.* --workers 0: .*$"):
        next(iter(data))


# --- Shards ------------------------------------------------------------------------------------------------------


def encoded_picture(index, kind):
    file = io.BytesIO()
    picture(index).save(file, kind)
    return file.getvalue()


def write_shard(path, samples):
    """Write a tar file; `samples` maps keys to files by suffix."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def sample(index):
    if index % 2:
        return {"jpg": encoded_picture(index, "JPEG"), "txt": caption(index).encode()}
    return {"png": encoded_picture(index, "PNG"), "json": json.dumps({"caption": caption(index), "n": 1}).encode()}


@pytest.fixture
def shards(tmp_path):
    pytest.importorskip("webdataset")
    for shard in range(4):
        write_shard(
            tmp_path / f"{shard}.tar", {f"{index:03d}": sample(index) for index in range(shard * 3, shard * 3 + 3)}
        )
    return tmp_path


def read_shards(shards, pattern="{0..3}.tar", *, batch_size=2, epoch_batches=6, position=0, **options):
    source = f"{shards}/{pattern}"
    data = TrainingData(source, PREPROCESS, CONTEXT, batch_size=batch_size, epoch_batches=epoch_batches, **options)
    data.skip(position)
    return data


def numbers(batch):
    """Return the indices of a batch's examples, determined from the first word of their captions."""
    by_ids = {tuple(tokenize(caption(index), CONTEXT)[0].tolist()): index for index in range(12)}
    return [by_ids[(*ids, *[0] * (CONTEXT - len(ids)))] for ids in batch.ids.tolist()]


def test_shards_hold_both_kinds_of_picture_and_caption(shards):
    batches = take(read_shards(shards), 6)
    drawn = [index for batch in batches for index in numbers(batch)]
    assert sorted(drawn) == list(range(12))
    assert len({image_id for batch in batches for image_id in batch.image_ids.tolist()}) == 12
    for batch in batches:
        for pixels, index in zip(batch.pixels, numbers(batch), strict=True):
            file = encoded_picture(index, "JPEG" if index % 2 else "PNG")
            assert torch.equal(pixels, PREPROCESS(file))


def test_shards_are_shuffled_by_seed_and_epoch_each_in_its_own_order(shards):
    data = read_shards(shards, batch_size=3, epoch_batches=4)
    epochs = [[numbers(batch) for batch in take(data, 4)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert epochs[0] != epochs[1]
    reseeded = read_shards(shards, batch_size=3, epoch_batches=4, seed=3)
    assert [numbers(batch) for batch in take(reseeded, 4)] not in epochs


@pytest.mark.parametrize("position", [2, 6, 9])
def test_shards_go_on_exactly_after_a_restart(shards, position):
    expected = take(read_shards(shards), position + 5)[position:]
    assert_same_batches(take(read_shards(shards, position=position), 5), expected)


@pytest.mark.parametrize("position", [2, 6, 9])
def test_captions_of_shards_are_changed_alike_after_a_restart(shards, position):
    """Foreign sentences come from the previous sample, which is read again."""
    options = {"augmentation": Augmentation.parse(["foreign:0.7", "words:0.5"])}
    expected = take(read_shards(shards, **options), position + 5)
    assert_same_batches(take(read_shards(shards, position=position, **options), 5), expected[position:])
    plain = take(read_shards(shards), position + 5)
    assert any(changed.ids.shape != as_it_is.ids.shape for changed, as_it_is in zip(expected, plain, strict=True))


def test_an_epoch_longer_than_the_shards_reads_them_again(shards):
    batches = [numbers(batch) for batch in take(read_shards(shards, epoch_batches=8), 8)]
    assert batches[6:] == batches[:2]


def test_one_worker_reads_as_none(shards):
    assert_same_batches(take(read_shards(shards, workers=1), 7), take(read_shards(shards), 7))


def test_shards_are_split_over_processes(shards):
    shares = [take(read_shards(shards, epoch_batches=3, rank=rank, world=2), 3) for rank in (0, 1)]
    assert sorted(index for batch in flat(shares) for index in numbers(batch)) == list(range(12))


def test_shards_need_the_length_of_an_epoch(shards):
    with pytest.raises(ConfigError, match="expected epoch_batches with webdataset shards"):
        read_shards(shards, epoch_batches=0)


def test_a_broken_picture_in_a_shard_is_left_out_and_named(shards):
    broken = sample(1) | {"jpg": b"no picture"}
    write_shard(shards / "0.tar", {"000": sample(0), "001": broken, "002": sample(2)})
    batches = take(read_shards(shards, "{0..1}.tar", batch_size=5, epoch_batches=1), 1)
    assert sorted(numbers(batches[0])) == [0, 2, 3, 4, 5]
    (message,) = batches[0].broken
    assert f"{shards}/0.tar:001" in message


def test_many_broken_samples_in_a_row_are_reported_and_passed_over(shards):
    files = {f"{index:03d}": {"jpg": b"none", "txt": b"a"} for index in range(250)}
    write_shard(shards / "0.tar", {**files, **{f"x{index}": sample(index) for index in range(2)}})
    *reports, batch = take(read_shards(shards, "0.tar"), 3)
    assert [len(report) for report in reports] == [0, 0]
    assert [len(report.broken) for report in [*reports, batch]] == [100, 100, 50]
    assert sorted(numbers(batch)) == [0, 1]


def test_shards_without_any_picture_end_with_an_error(shards):
    write_shard(shards / "0.tar", {f"{index:03d}": {"jpg": b"none", "txt": b"a"} for index in range(120)})
    data = iter(read_shards(shards, "0.tar"))
    assert [len(next(data).broken) for _ in range(2)] == [100, 20]
    with pytest.raises(
        TrainingError, match=r"less than one batch .*; 120 samples cannot be read, the last: .*0\.tar:119"
    ):
        next(data)


def test_shards_of_less_than_a_batch_are_refused(shards):
    with pytest.raises(TrainingError, match="the shards hold less than one batch per worker"):
        next(iter(read_shards(shards, "0.tar", batch_size=4)))


@pytest.mark.parametrize(
    "files",
    [
        {"txt": b"a"},
        {"gif": encoded_picture(1, "GIF"), "txt": b"a"},
        {"jpg": encoded_picture(1, "JPEG")},
        {"jpg": encoded_picture(1, "JPEG"), "txt": b"\n"},
        {"jpg": encoded_picture(1, "JPEG"), "json": b'{"text": "a"}'},
        {"jpg": encoded_picture(1, "JPEG"), "json": b"[1]"},
        {"jpg": encoded_picture(1, "JPEG"), "json": b'{"caption": 3}'},
        {"jpg": encoded_picture(1, "JPEG"), "txt": "café".encode("latin-1")},
    ],
    ids=["no picture", "GIF", "no caption", "empty caption", "another key", "no object", "a number", "not UTF-8"],
)
def test_a_sample_of_another_layout_is_named_and_passed_over(shards, files):
    write_shard(shards / "0.tar", {"abc": files, **{f"x{index}": sample(index) for index in range(2)}})
    (batch,) = take(read_shards(shards, "0.tar"), 1)
    assert sorted(numbers(batch)) == [0, 1]
    (reason,) = batch.broken
    assert re.search(
        rf"0\.tar:abc: expected a picture .* and a caption .*, found \['{sorted(files)[0]}'|0\.tar:abc: expected a cap",
        reason,
    )


@pytest.mark.parametrize(
    "damage", ["cut in a picture", "cut in a header", "cut behind a member", "missing", "no archive"]
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_cannot_be_read_is_named_and_passed_over(shards, damage, workers):
    path = shards / "0.tar"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            second = tar.getmembers()[2]
        ends = {"cut in a picture": second.offset_data + 3, "cut in a header": second.offset + 30}
        end = ends.get(damage, second.offset)
        path.write_bytes(b"\1" * 5000 if damage == "no archive" else content[:end])
    data = iter(read_shards(shards, "{0..1}.tar", batch_size=3, epoch_batches=2, workers=workers))
    batches = [next(data) for _ in range(3)]
    assert [index for batch in batches if len(batch) for index in numbers(batch) if index > 2] != []
    reasons = [reason for batch in batches for reason in batch.broken]
    assert reasons
    assert all(re.match(r"cannot read a webdataset shard: .*0\.tar: [^\n]*$", reason) for reason in reasons)
    data = read_shards(shards, "0.tar", epoch_batches=1, batch_size=4, workers=workers)
    with pytest.raises(TrainingError, match=r"less than one batch.* samples cannot be read, the last: .*0\.tar"):
        take(data, 9)


# --- Resuming with other processes -------------------------------------------------------------------------------


def merged(states):
    """Merge the states of all processes, as a run does."""
    state = dict(states[0])
    if "places" in state:
        state["places"] = torch.stack([state["places"] for state in states]).amax(dim=0)
    return state


def take_on_all(make, states, batches, world, **options):
    """Return the batches of all processes, and their merged state afterwards."""
    streams = [make(rank=rank, world=world, **options) for rank in range(world)]
    for data in streams:
        if states:
            data.load_state_dict(states)
    batches = [take(data, batches) for data in streams]
    return batches, merged([data.state_dict() for data in streams])


@given(worlds=st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4), count=st.integers(1, 3))
def test_other_processes_take_the_rest_of_the_epoch_once_each(worlds, count):
    size, batch_size, state, drawn = 60, 2, None, []
    for world in worlds:
        if len(drawn) + count * world * batch_size > size:
            break
        batches, state = take_on_all(lambda **options: stream(size, batch_size, **options), state, count, world)
        drawn += [index for batch in flat(batches) for index in members(batch)]
    assert len(set(drawn)) == len(drawn) == state["pairs"]
    (rest,) = take_on_all(
        lambda **options: stream(size, batch_size, **options), state, (size - len(drawn)) // batch_size, 1
    )[0]
    assert sorted(drawn + [index for batch in rest for index in members(batch)]) == list(range(size))


def test_an_epoch_of_which_less_than_a_batch_is_left_is_over():
    _, state = take_on_all(lambda **options: stream(22, 4, **options), None, 5, 1)
    batches, state = take_on_all(lambda **options: stream(22, 4, **options), state, 1, 2)
    assert state == {"epoch": 1, "pairs": 8}
    assert flat(members(batch) for batch in flat(batches)) == sampled(22, 8, epoch=1, seed=0)[0][0]


def test_the_places_of_a_state_of_former_versions_are_found():
    data = stream(48, 2, rank=1, world=2)
    data.skip(15, processes=4)
    assert data.state_dict() == {"epoch": 2, "pairs": 24}  # an epoch has 6 batches of 8


@pytest.mark.parametrize(
    ("before", "after"), [((1, 0), (2, 0)), ((2, 0), (1, 0)), ((1, 2), (1, 0)), ((1, 0), (1, 2)), ((2, 1), (1, 2))]
)
@pytest.mark.parametrize("count", [1, 2])
def test_shards_go_on_with_other_processes_and_workers_where_they_were(shards, before, after, count):
    def make(**options):
        return read_shards(shards, batch_size=1, **options)

    (world, workers), (other_world, other_workers) = before, after
    batches, state = take_on_all(make, None, count, world, workers=workers, epoch_batches=12 // world)
    left = 12 - count * world if other_world == 1 else 4  # at least, from each process's shards
    rest, state = take_on_all(make, state, left, other_world, workers=other_workers, epoch_batches=12 // other_world)
    drawn = [index for batch in flat(batches) + flat(rest) for index in numbers(batch)]
    assert len(set(drawn)) == len(drawn) == count * world + left * other_world
    assert state["epoch"] == 0


def test_shards_of_which_some_were_read_twice_go_on_with_other_processes(shards):
    def make(**options):
        return read_shards(shards, batch_size=1, **options)

    _, state = take_on_all(make, None, 14, 1, epoch_batches=24)  # the second pass is two samples old
    batches, _ = take_on_all(make, state, 5, 2, epoch_batches=12)
    assert len({index for batch in flat(batches) for index in numbers(batch)}) == 10


@pytest.mark.parametrize("count", [1, 4, 5, 6, 8, 12, 13])
def test_shards_of_as_many_processes_and_workers_go_on_to_the_bit(shards, count):
    """The run may have been resumed with other numbers before."""
    _, state = take_on_all(lambda **options: read_shards(shards, **options), None, 1, 1)
    make = lambda **options: read_shards(shards, workers=2, **options)  # noqa: E731
    expected = take_on_all(make, state, count + 4, 1)[0][0][count:]
    _, later = take_on_all(make, state, count, 1)
    assert_same_batches(take_on_all(make, later, 4, 1)[0][0], expected)


def test_an_earlier_versions_state_of_shards_needs_as_many_processes(shards):
    with pytest.raises(ConfigError, match="to resume, use as many processes as it had, 4"):
        read_shards(shards).skip(3, processes=4)
