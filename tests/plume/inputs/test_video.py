"""Video: sampling, decoding, and packing that equals Qwen2-VL's own processor."""

from __future__ import annotations

import base64
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from plume import InputError, Item, PlumeModel
from plume.inputs.patches import PatchFormat, pack_videos
from plume.inputs.video import Sampling, Video, load_video, sample_frames

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SMALL = Sampling(min_pixels=784, max_pixels=56 * 56)


def write_clip(path: Path, num_frames: int, width: int = 64, height: int = 48, rate: int = 10, gop: int = 12) -> Path:
    """A clip whose neighbouring frames differ by at least 16 shades of grey, more than compression blurs."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = Fraction(1, rate)
        for index in range(num_frames):
            grey = np.full((height, width, 3), shade(index), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey)))
        container.mux(stream.encode())
    return path


def shade(index: int) -> int:
    return 16 * (index * 7 % 16)


def greys(video: Video) -> list[int]:
    return [round(frame.float().mean().item()) for frame in video.frames]


def packed(videos: list[Video]) -> dict[str, torch.Tensor]:
    return pack_videos(videos, PatchFormat(pixels=(784, 602_112), mean=MEAN, std=STD))


def noise(num_frames: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def test_eight_frames_are_taken_evenly_from_the_first_to_the_last():
    assert sample_frames(100, Sampling()) == [int(i * 99 / 7) for i in range(8)]
    assert sample_frames(8, Sampling()) == list(range(8))
    assert sample_frames(5, Sampling()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("fps", "max_frames", "expected"),
    [(1, 64, [0, 10, 20, 30]), (2.5, 64, list(range(0, 40, 4))), (100, 64, list(range(40))), (5, 3, [0, 19, 39])],
)
def test_frames_per_second_are_taken_up_to_a_limit(fps, max_frames, expected):
    assert (
        sample_frames(40, Sampling(fps=fps, max_frames=max_frames), times=[index / 10 for index in range(40)])
        == expected
    )


def test_frames_per_second_of_a_source_without_any_are_refused(picture):
    with pytest.raises(InputError, match="input 4: frames per second are unknown"):
        load_video([picture(), picture()], Sampling(fps=1), "input 4")


def test_a_file_gives_the_frames_that_were_asked_for(tmp_path):
    clip = write_clip(tmp_path / "a clip.mp4", 60)
    video = load_video(clip, SMALL)
    assert np.allclose(greys(video), [shade(index) for index in sample_frames(60, SMALL)], atol=7)
    assert video.frames.shape == (8, 3, 56, 56)
    assert video.seconds_per_frame == pytest.approx(59 / 7 / 10)


def test_a_clip_of_a_phone_stands_upright(tmp_path):
    """The file holds a matrix that turns frames by 90 degrees clockwise, so that what is left comes to the top."""
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 112, 56, "yuv420p"
        for _ in range(3):
            frame = np.zeros((56, 112, 3), np.uint8)
            frame[:, :56] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    frame = load_video(path, Sampling(min_pixels=784, max_pixels=602_112)).frames[0].float()
    assert frame.shape == (3, 112, 56)
    assert frame[:, :50].mean() > 240
    assert frame[:, 62:].mean() < 15


def test_long_stretches_are_jumped_over_and_end_at_the_same_frames(tmp_path):
    clip = write_clip(tmp_path / "long.mp4", 2400, width=32, height=32, gop=50)
    video = load_video(str(clip), SMALL)
    assert np.allclose(greys(video), [shade(index) for index in sample_frames(2400, SMALL)], atol=7)


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "mpg", "ts"])
@pytest.mark.parametrize("rhythm", ["steady", "bursts"])
def test_the_right_frames_are_found_whatever_the_container_and_its_rhythm(tmp_path, suffix, rhythm, monkeypatch):
    """Index by index, as reading from the start finds them, also where frames come in bursts."""
    if suffix in ("mpg", "ts") and rhythm == "bursts":
        pytest.skip("the container keeps no time stamps of its own")
    path = tmp_path / f"clip.{suffix}"
    codec = "mpeg2video" if suffix in ("mpg", "ts") else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.gop_size = 12
        tick = Fraction(1, 25) if codec == "mpeg2video" else Fraction(1, 1000)
        stream.codec_context.time_base = tick
        moment = 0
        for index in range(1500):
            frame = np.zeros((64, 64, 3), np.uint8)
            for bit in range(11):  # the index, in stripes
                frame[:, 5 * bit : 5 * bit + 5] = 255 * (index >> bit & 1)
            picture = av.VideoFrame.from_ndarray(frame)
            picture.pts, picture.time_base = moment, tick
            moment += Fraction(1, 25) // tick if rhythm == "steady" else (10 if index % 300 < 200 else 200)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    video = load_video(path, Sampling(min_pixels=784, max_pixels=64 * 64))
    found = [
        sum((frame[0, :, int(56 * (5 * bit + 2.5) / 64)].float().mean() > 128).item() << bit for bit in range(11))
        for frame in video.frames
    ]
    expected = sample_frames(1500, Sampling())
    assert found[:-1] == expected[:-1]
    assert abs(found[-1] - expected[-1]) <= 1  # encoders may drop the last frame


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.76, 0.9, 0.99])
def test_a_damaged_gif_is_named_or_read(tmp_path, share):
    frames = [Image.effect_noise((60, 60), 80) for _ in range(6)]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    try:
        outcome = Item.parse(path, "input 1").modality
    except InputError as error:
        outcome = str(error)
    assert outcome in ("image", "video") or outcome.startswith("input 1: ")


def test_an_animated_gif_needs_no_decoder_and_a_still_one_is_an_image(tmp_path):
    sheets = [Image.new("RGB", (56, 56), (index * 20,) * 3) for index in range(10)]
    sheets[0].save(tmp_path / "moving.gif", save_all=True, append_images=sheets[1:], duration=100)
    sheets[3].save(tmp_path / "still.gif")
    (video,) = Item.parse(tmp_path / "moving.gif").videos
    assert np.allclose(greys(video), [20 * index for index in sample_frames(10, Sampling())], atol=3)
    assert Item.parse(tmp_path / "still.gif").modality == "image"


def test_all_ways_to_pass_frames_agree(tmp_path):
    frames = noise(3, 56, 84)
    images = [Image.fromarray(frame) for frame in frames]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    expected = load_video(frames, SMALL).frames
    ways = [
        images,
        [tmp_path / f"{index}.png" for index in range(3)],
        torch.from_numpy(frames).permute(0, 3, 1, 2),
        {"array": frames, "video_metadata": {"fps": 2.0}},
    ]
    for way in ways:
        (video,) = Item.parse({"video": way}, limits=None).videos
        (small,) = (load_video(way, SMALL),)
        assert torch.equal(small.frames, expected)
        assert len(video.frames) == 3
    assert load_video(ways[-1], SMALL).seconds_per_frame == 0.5


def test_patches_are_those_of_the_documented_formula():
    """(pixel / 255 - mean) / std; two frames per patch, four patches per token, odd lengths end with a copy."""
    frames = torch.from_numpy(noise(3, 56, 84)).permute(0, 3, 1, 2)
    found = packed([Video(frames)])
    assert found["video_grid_thw"].tolist() == [[2, 4, 6]]
    normal = (frames.double() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    normal = torch.cat([normal, normal[-1:]])
    expected = [
        normal[2 * t : 2 * t + 2, :, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14].transpose(0, 1).flatten()
        for t in range(2)
        for block_row in range(2)
        for block_column in range(3)
        for row in (2 * block_row, 2 * block_row + 1)
        for column in (2 * block_column, 2 * block_column + 1)
    ]
    assert torch.allclose(found["pixel_values_videos"].double(), torch.stack(expected), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 56, 56), (4, 100, 75), (7, 300, 500), (8, 28, 200)], ids=str)
def test_packing_equals_that_of_transformers_to_the_bit(shape):
    pytest.importorskip("torchvision", reason="transformers' video processor needs torchvision", exc_type=Exception)
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    sampling = Sampling(num_frames=99, min_pixels=4 * 784, max_pixels=64 * 784)
    frames = noise(*shape)
    stock = Qwen2VLVideoProcessor(
        size={"shortest_edge": sampling.min_pixels, "longest_edge": sampling.max_pixels}, cap_pixels_per_frame=False
    )
    expected = stock([torch.from_numpy(frames).permute(0, 3, 1, 2)], return_tensors="pt")
    found = packed([load_video(frames, sampling)])
    assert torch.equal(found["pixel_values_videos"], expected["pixel_values_videos"])
    assert torch.equal(found["video_grid_thw"], expected["video_grid_thw"])


def test_the_model_embeds_video_as_the_stock_model_reads_it(model, tmp_path):
    """Prefix states with a video equal those of Qwen2-VL itself, which finds positions and features by its own code."""
    item = model.processor.parse({"video": noise(5, 60, 90), "text": "red", "max_frames": 4})
    batch = model.processor.encode([item])
    assert batch["video_grid_thw"].tolist()[0][0] == 2
    kinds = 2 * (batch["input_ids"] == model.config.backbone_config.video_token_id).int()
    stock = model.backbone(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values_videos=batch["pixel_values_videos"],
        video_grid_thw=batch["video_grid_thw"],
        mm_token_type_ids=kinds,
        use_cache=False,
    )
    state = model(**batch).states[:, 0]
    assert torch.allclose(state, stock.last_hidden_state[:, -1], atol=1e-5)


def test_a_video_in_a_batch_does_not_change_its_neighbours(model):
    items = [Item.parse("red"), model.processor.parse({"video": noise(4, 56, 56)}), Item.parse("blue kite")]
    together = model(**model.processor.encode(items)).embedding
    alone = torch.cat([model(**model.processor.encode([item])).embedding for item in items])
    assert torch.allclose(together, alone, atol=1e-5)


def bad_clips(folder: Path) -> dict[str, tuple[object, str]]:
    whole = write_clip(folder / "whole.mp4", 30).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video")
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    return {
        "cut off": (folder / "cut.mp4", "cannot be decoded as a video"),
        "zero bytes": (folder / "empty.mp4", "cannot be decoded as a video"),
        "text": (folder / "text.mp4", "cannot be decoded as a video"),
        "sound only": (folder / "sound.mp4", "has no video stream"),
        "missing": (folder / "none.mp4", "no file at"),
        "no frames": ([], "an empty list"),
        "floats": (np.zeros((2, 8, 8, 3)), "expected uint8"),
        "two sizes": ([Image.new("RGB", (56, 56)), Image.new("RGB", (28, 56))], "differ in size"),
        "number": (7, "a int"),
    }


def test_a_video_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    for name, (raw, message) in bad_clips(tmp_path).items():
        with pytest.raises(InputError, match="input 2") as caught:
            Item.parse({"video": raw}, "input 2")
        assert message in str(caught.value), name


def test_a_saved_checkpoint_keeps_its_frames(backbone_folder, tmp_path):
    model = PlumeModel.from_backbone(str(backbone_folder), video_num_frames=2, video_max_pixels=56 * 56 * 32)
    model.save_pretrained(tmp_path)
    loaded = PlumeModel.from_pretrained(tmp_path)
    for processor in (model.processor, loaded.processor):
        (video,) = processor.parse({"video": noise(9, 300, 400)}).videos
        assert len(video.frames) == 2
        assert video.frames[0, 0].numel() <= 56 * 56 * 32


def numbered_clip(path: Path, times: list[float], codec: str = "mpeg4") -> Path:
    """A clip whose frames appear at these times and bear their numbers, in stripes."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, moment in enumerate(times):
            frame = np.zeros((64, 64, 3), np.uint8)
            for bit in range(11):
                frame[:, 5 * bit : 5 * bit + 5] = 255 * (index >> bit & 1)
            picture = av.VideoFrame.from_ndarray(frame)
            picture.pts, picture.time_base = round(moment * 1000), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def numbers(video: Video) -> list[int]:
    return [
        sum((frame[0, :, int(56 * (5 * bit + 2.5) / 64)].float().mean() > 128).item() << bit for bit in range(11))
        for frame in video.frames
    ]


RHYTHMS = {
    "a burst, then one a second": [index / 30 for index in range(30)] + [float(second) for second in range(1, 11)],
    "one a second, then a burst": [float(second) for second in range(10)] + [10 + index / 30 for index in range(31)],
    "ever slower": [0.05 * index**1.5 for index in range(40)],
}


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize("rhythm", RHYTHMS)
def test_frames_per_second_follow_presentation_times(tmp_path, suffix, rhythm):
    """At each second that frame is taken which is on the screen, whatever the average rate of the file is."""
    times = RHYTHMS[rhythm]
    clip = numbered_clip(tmp_path / f"clip.{suffix}", times)
    video = load_video(clip, Sampling(fps=1, min_pixels=784, max_pixels=64 * 64))
    seconds = range(int(times[-1]) + 1)
    expected = list(dict.fromkeys(max(i for i, at in enumerate(times) if at <= second + 1e-3) for second in seconds))
    assert numbers(video) == expected
    spacing = (times[expected[-1]] - times[expected[0]]) / (len(expected) - 1)
    assert video.seconds_per_frame == pytest.approx(spacing, abs=0.02)
    few = load_video(clip, Sampling(fps=1, max_frames=3, min_pixels=784, max_pixels=64 * 64))
    middle = max(i for i, moment in enumerate(times) if moment <= times[-1] / 2 + 0.001)
    assert numbers(few) == [0, middle, len(times) - 1]


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animations_with_frames_of_unequal_duration_are_sampled_by_time(tmp_path, suffix):
    sheets = [Image.new("RGB", (56, 56), (index * 20,) * 3) for index in range(12)]
    durations = [100] * 10 + [2000, 1000]  # ten frames in the first second, then two that stand
    lossless = {"lossless": True} if suffix == "webp" else {}
    sheets[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=sheets[1:], duration=durations, **lossless)
    video = load_video(tmp_path / f"a.{suffix}", Sampling(fps=1, min_pixels=784, max_pixels=56 * 56))
    assert np.allclose(greys(video), [0, 200, 220], atol=3)
    assert video.seconds_per_frame == pytest.approx(1.5)


def test_a_file_that_opens_others_or_the_network_is_refused(tmp_path):
    write_clip(tmp_path / "neighbour.mp4", 10)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile neighbour.mp4\n")
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nneighbour.mp4\n#EXT-X-ENDLIST\n"
    (tmp_path / "playlist.mp4").write_text(playlist)
    session = (
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 50044 RTP/AVP 96\n"
        b"a=rtpmap:96 H264/90000\n"
    )
    uri = "data:video/mp4;base64," + base64.b64encode(session).decode()
    for raw in (str(tmp_path / "list.mp4"), str(tmp_path / "playlist.mp4"), uri, session):
        with pytest.raises(InputError, match="cannot be decoded as a video"):
            load_video(raw, SMALL)


def test_what_would_take_without_end_to_decode_is_refused(tmp_path, monkeypatch):
    """Each frame of such a file is a few bytes; its pixels are what costs."""
    sheets = [Image.new("L", (60, 60), index) for index in range(9)]
    sheets[0].save(tmp_path / "a.gif", save_all=True, append_images=sheets[1:])
    clip = write_clip(tmp_path / "a.mp4", 60)
    monkeypatch.setattr("plume.inputs.video.MAX_ANIMATION_PIXELS", 60 * 60 * 8)
    monkeypatch.setattr("plume.inputs.video.MAX_VIDEO_PIXELS", 64 * 48 * 50)
    with pytest.raises(InputError, match="has 9 frames of 60 x 60 pixels, more than 28,800 pixels in all"):
        load_video(tmp_path / "a.gif", SMALL, "input 1")
    with pytest.raises(InputError, match=r"input 1: .*a.mp4: it takes too long to decode"):
        load_video(clip, SMALL, "input 1")


def test_bytes_of_a_video_are_a_video(tmp_path):
    content = write_clip(tmp_path / "a.mp4", 20).read_bytes()
    expected = load_video(tmp_path / "a.mp4", SMALL).frames
    ways = [content, {"bytes": content, "path": "a.mp4"}, {"bytes": None, "path": str(tmp_path / "a.mp4")}]
    for raw in ways:
        assert torch.equal(load_video(raw, SMALL).frames, expected)
        (video,) = Item.parse({"video": raw}).videos
        assert len(video.frames) == 8


def test_transparent_frames_of_a_file_stand_on_the_background(tmp_path):
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 56, 56, "rgba"
        for _ in range(3):
            frame = np.zeros((56, 56, 4), np.uint8)
            frame[:, :28, 3] = 255  # black on the left, nothing on the right
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgba")))
        container.mux(stream.encode())
    for background, expected in (("white", 255), (None, 0), ("#808080", 128)):
        frame = load_video(path, SMALL, background=background).frames[0].float()
        assert frame[:, :, :26].mean() < 3
        assert frame[:, :, 30:].mean() == pytest.approx(expected, abs=3)
    frames = [Image.new("RGBA", (56, 56), (0, 0, 0, 0))] * 2
    assert load_video(frames, SMALL).frames.min() == 255
