from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastsd.errors import FastsdError
from fastsd.server.a1111.bodies import REFUSED, ImageToImage, TextToImage
from fastsd.server.a1111.controlnet import resize_control
from fastsd.server.a1111.translate import resize, translate
from fastsd.server.catalogue import Catalogue
from fastsd.server.jobs import UpscalerChoice
from fastsd.server.limits import Limits
from fastsd.server.orders import Draft, make_order
from fastsd.server.settings import ServerSettings
from fastsd.server.styles import Styles
from tests.support.server import encoded, png

WEBUIAPI = {  # what webuiapi 0.9.17 sends besides the caller's own
    "eta": 1.0,
    "s_churn": 0,
    "s_tmax": 0,
    "s_tmin": 0,
    "s_noise": 1,
    "scheduler": "automatic",
    "sampler_index": "Euler a",
    "sampler_name": "Euler a",
    "restore_faces": False,
    "tiling": False,
    "firstphase_width": 0,
    "firstphase_height": 0,
    "override_settings": {},
    "override_settings_restore_afterwards": True,
    "script_args": [],
    "script_name": None,
    "save_images": False,
    "alwayson_scripts": {},
    "do_not_save_samples": False,
    "do_not_save_grid": False,
}


def draft(
    kind: Any = TextToImage, styles: Styles | None = None, catalogue: Catalogue | None = None, **body: Any
) -> Draft:
    known = catalogue or Catalogue(ServerSettings())
    return translate(kind(**body), {}, known, styles or Styles(None), Limits())


def arguments(kind: Any = TextToImage, **body: Any) -> dict[str, Any]:
    return {name: value for name, value in draft(kind, **body).arguments.items() if value is not None}


def test_a_body_without_fields_leaves_everything_to_the_model() -> None:
    assert arguments() == {
        "prompt": "",
        "negative_prompt": "",
        "num_images_per_prompt": 1,
        "batch_size": 1,
        "seed": -1,
    }
    nulls = dict.fromkeys(TextToImage.model_fields)
    assert arguments(**nulls) == arguments()


def test_what_webuiapi_sends_has_no_effect_of_its_own() -> None:
    found = draft(prompt="a cat", **WEBUIAPI)
    assert found.notes == [] and found.arguments["sampler"] == "euler_a" and "eta" not in found.arguments


def test_fields_become_arguments() -> None:
    found = arguments(
        prompt="a cat",
        negative_prompt="fog",
        seed=5,
        steps=20,
        cfg_scale=4.5,
        width=512,
        height=768,
        batch_size=2,
        n_iter=3,
        sampler_name="DPM++ 2M Karras",
        subseed=9,
        subseed_strength=0.25,
        seed_resize_from_w=256,
        seed_resize_from_h=512,
        override_settings={"CLIP_stop_at_last_layers": 2, "eta_noise_seed_delta": 31337, "randn_source": "NV"},
    )
    assert found == {
        "prompt": "a cat",
        "negative_prompt": "fog",
        "seed": 5,
        "num_inference_steps": 20,
        "guidance_scale": 4.5,
        "width": 512,
        "height": 768,
        "batch_size": 2,
        "num_images_per_prompt": 6,
        "sampler": "dpm++2m",
        "schedule": "karras",
        "subseed": 9,
        "subseed_strength": 0.25,
        "seed_resize_from": "256x512",
        "clip_skip": 2,
        "ensd": 31337,
        "noise": "gpu",
    }


@pytest.mark.parametrize(
    ("sent", "sampler", "schedule"),
    [
        ({"sampler_index": "Euler"}, "euler", None),
        ({"sampler_name": "Euler", "scheduler": "Karras"}, "euler", "karras"),
        ({"sampler_name": "k_dpmpp_2m_ka"}, "dpm++2m", "karras"),
        ({"sampler_name": "DPM++ 2M", "scheduler": "normal"}, "dpm++2m", "normal"),
        ({"sampler_name": "DDIM", "scheduler": "Karras"}, "ddim", None),  # it steps between training timesteps
        ({"scheduler": "Exponential"}, None, "Exponential"),
    ],
)
def test_sampler_and_scheduler_are_read_as_clients_name_them(
    sent: dict[str, str], sampler: str | None, schedule: str | None
) -> None:
    found = draft(**sent).arguments
    assert (found["sampler"], found["schedule"]) == (sampler, schedule)


def test_eta_reaches_the_sampler_that_has_one() -> None:
    assert arguments(sampler_name="DDIM", eta=1.0)["eta"] == 1.0
    assert arguments(eta=0.5)["eta"] == 0.5  # the model's own sampler may have one
    with pytest.raises(FastsdError, match="eta is 0.5; not supported"):
        arguments(sampler_name="Euler a", eta=0.5)


def test_the_hires_fix() -> None:
    found = arguments(enable_hr=True, hr_scale=1.5, hr_upscaler="Lanczos", denoising_strength=0.4)
    assert (found["hires_scale"], found["hires_upscaler"], found["hires_strength"]) == (1.5, "lanczos", 0.4)
    assert "hires_steps" not in found
    assert arguments(enable_hr=True, hr_upscaler="None")["hires_upscaler"] == "lanczos"
    # A1111 runs all 8 steps of the second pass: the last 8 of a schedule of 20, of which 0.4 are 8.
    assert arguments(enable_hr=True, hr_second_pass_steps=8, denoising_strength=0.4)["hires_steps"] == 20
    resized = arguments(enable_hr=True, width=64, height=32, hr_resize_x=96, hr_resize_y=48)
    assert resized["hires_scale"] == 1.5
    assert "hires_scale" not in arguments(hr_scale=2, denoising_strength=0.5)
    for wrong in ({"hr_upscaler": "ESRGAN_4x"}, {"hr_resize_x": 96, "hr_resize_y": 96, "width": 64, "height": 32}):
        with pytest.raises(FastsdError, match="hr_upscaler|hr_resize_x"):
            arguments(enable_hr=True, **wrong)


def test_the_hires_fix_by_an_upscaler_that_is_listed(tmp_path: Path) -> None:
    (tmp_path / "4x-Sharp.safetensors").write_bytes(b"x")
    catalogue = Catalogue(ServerSettings(upscaler_dir=str(tmp_path)))
    body = TextToImage(enable_hr=True, hr_scale=2, hr_upscaler="4x-sharp")
    found = translate(body, {}, catalogue, Styles(None), Limits())
    assert found.upscaler == UpscalerChoice("4x-Sharp", str(tmp_path / "4x-Sharp.safetensors"))
    order = make_order(found, "a1111", catalogue.models[0], catalogue, Limits())
    assert order.upscaler == found.upscaler and "hires_upscaler" not in order.arguments
    other = make_order(draft(enable_hr=True), "a1111", catalogue.models[0], catalogue, Limits())
    assert order.key != other.key


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_its_name(name: str) -> None:
    without_effect, _ = REFUSED[name]
    usual = next(iter(without_effect))
    arguments(**{name: usual})
    other: Any = {bool: True, str: "something", int: 5}[type(usual)]
    churn = {"s_churn": 1} if name == "s_tmax" else {}
    with pytest.raises(FastsdError, match="not supported") as refused:
        arguments(**{name: other}, **churn)
    assert refused.value.argument == name or churn


def test_a_second_seed_that_is_left_out_is_drawn() -> None:
    catalogue = Catalogue(ServerSettings())
    for left in ({}, {"subseed": -1}, {"subseed": None}):
        order = make_order(draft(subseed_strength=0.5, **left), "a1111", catalogue.models[0], catalogue, Limits())
        assert 0 <= order.arguments["subseed"] < 2**32


def test_empty_boxes_have_no_effect() -> None:
    body = TextToImage(prompt="a cat", styles=[""], override_settings={"sd_model_checkpoint": ""})
    found = translate(body, {}, Catalogue(ServerSettings()), Styles(None), Limits())
    assert found.arguments["prompt"] == "a cat" and found.model is None and not found.notes


def test_other_scripts_and_settings_are_refused_and_empty_ones_are_not() -> None:
    arguments(alwayson_scripts={"ADetailer": {"args": []}, "Refiner": {}, "Sampler": None})
    with pytest.raises(FastsdError, match="the script 'ADetailer'"):
        arguments(alwayson_scripts={"ADetailer": {"args": [{"ad_model": "face"}]}})
    with pytest.raises(FastsdError) as refused:
        arguments(override_settings={"sd_vae": "other.safetensors"})
    assert refused.value.argument == "sd_vae"


def test_fields_that_nobody_knows_are_noted_by_name() -> None:
    """SillyTavern's body carries `url` and `auth`."""
    assert draft(url="http://127.0.0.1", auth="").notes == ["fields that are not known and have no effect: url, auth"]


def test_an_image_to_start_from() -> None:
    found = draft(ImageToImage, init_images=[png((64, 48))])
    assert found.arguments["image"].size == (64, 48) and found.arguments["strength"] == 0.75
    assert (found.arguments["width"], found.arguments["height"]) == (64, 48)
    assert len(found.facts["image"]["sha256"]) == 64
    uri = f"data:image/png;base64,{png((64, 48))}"
    assert draft(ImageToImage, init_images=[uri], width=32, height=32).arguments["image"].size == (32, 32)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([], "0 images; it should hold one"),
        (None, "0 images; it should hold one"),
        ([png(), png()], "2 images; it should hold one"),
        (["http://169.254.169.254/latest"], "a URL, which is not fetched"),
        (["file:///etc/passwd"], "a URL, which is not fetched"),
        (["/etc/passwd"], "not base64|not an image"),
        (["????"], "not base64"),
        ([""], "the image is empty"),
        (["aGVsbG8="], "not an image that can be read"),
    ],
)
def test_what_is_no_image_is_refused(images: Any, said: str) -> None:
    with pytest.raises(FastsdError, match=said) as refused:
        draft(ImageToImage, init_images=images)
    assert refused.value.argument == "init_images"


def test_inpainting_has_the_defaults_of_a1111s_api() -> None:
    found = draft(ImageToImage, init_images=[png()], mask=png(mode="L", colour=255)).arguments
    assert (found["mask_blur"], found["inpaint_fill"], found["inpaint_only_masked"]) == (4.0, "fill", True)
    assert (found["inpaint_padding"], found["mask_invert"]) == (0, False)
    own = {"mask_blur": 8, "inpainting_fill": 2, "inpaint_full_res": False, "inpainting_mask_invert": 1}
    found = draft(ImageToImage, init_images=[png()], mask=png(mode="L", colour=255), **own).arguments
    assert (found["mask_blur"], found["inpaint_fill"], found["inpaint_only_masked"]) == (8, "noise", False)
    assert found["inpaint_padding"] is None and found["mask_invert"] is True


def test_an_image_that_is_resized_is_noted() -> None:
    wide = png((60, 40))
    assert draft(ImageToImage, init_images=[wide]).notes == ["the image was resized from 60x40 to 56x40"]
    assert draft(ImageToImage, init_images=[wide], width=64, height=64).notes == [
        "the image was resized from 60x40 to 64x64"
    ]


def test_an_image_of_another_shape_is_stretched_cropped_or_filled() -> None:
    """As A1111 does: a wide image, red at the left and blue at the right, becomes square."""
    image = Image.new("RGB", (64, 32), (255, 0, 0))
    image.paste((0, 0, 255), (32, 0, 64, 32))
    for mode, colours in ((0, "rb"), (1, "rb"), (2, "rb")):
        found = resize(image, (32, 32), mode)
        assert found.size == (32, 32)
        assert found.getpixel((0, 16)) == (255, 0, 0) and found.getpixel((31, 16)) == (0, 0, 255), (mode, colours)
    assert resize(image, (32, 32), 2).getpixel((0, 0)) == (255, 0, 0)  # the edge goes on above it
    assert resize(image.rotate(90, expand=True), (32, 32), 2).size == (32, 32)
    with pytest.raises(FastsdError, match="resize_mode"):
        resize(image, (32, 32), 3)


def test_styles_are_added(tmp_path: Path) -> None:
    table = tmp_path / "styles.csv"
    table.write_text('name,prompt,negative_prompt\nink,ink drawing,colour\nframe,"a {prompt}, framed",\n')
    found = draft(styles=Styles(str(table)), prompt="cat", negative_prompt="fog", styles_=None)
    assert found.arguments["prompt"] == "cat"
    body = TextToImage(prompt="cat", negative_prompt="fog", styles=["ink", "frame"])
    own = translate(body, {}, Catalogue(ServerSettings()), Styles(str(table)), Limits()).arguments
    assert (own["prompt"], own["negative_prompt"]) == ("a cat, ink drawing, framed", "fog, colour")
    with pytest.raises(FastsdError, match="no such style; did you mean ink"):
        translate(TextToImage(styles=["inc"]), {}, Catalogue(ServerSettings()), Styles(str(table)), Limits())


def test_controlnets(tmp_path: Path) -> None:
    (tmp_path / "canny.safetensors").write_bytes(b"")
    catalogue = Catalogue(ServerSettings(controlnet_dir=str(tmp_path)))

    def controls(**unit: Any) -> list[Any]:
        scripts = {"ControlNet": {"args": [{"image": png((64, 64)), "model": "canny [abc]"[:5], **unit}]}}
        return draft(catalogue=catalogue, alwayson_scripts=scripts, width=32, height=64).controls

    (control,) = controls(weight=0.5, guidance_start=0.1, guidance_end=0.9, pixel_perfect=True)
    assert control.parts == {"weight": 0.5, "start": 0.1, "end": 0.9} and control.image.size == (32, 64)
    assert control.path == str(tmp_path / "canny.safetensors") and control.map_kind is None
    for mode in ("Just Resize", "Crop and Resize", "Resize and Fill", 0, 1, 2):
        assert controls(resize_mode=mode)[0].image.size == ((64, 64) if mode in ("Just Resize", 0) else (32, 64))
    assert controls(module="canny", threshold_a=-1)[0].map_kind == "canny" and controls(enabled=False) == []
    for wrong in (
        {"module": "openpose"},
        {"model": "../canny"},
        {"model": None},
        {"image": None},
        {"image": "http://x"},
        {"weight": "much"},
        {"control_mode": 2},
        {"resize_mode": 3},
        {"resize_mode": "Fill"},
        {"mask": png()},
    ):
        with pytest.raises(FastsdError, match="controlnet\\[0\\]|no such ControlNet"):
            controls(**wrong)


def test_maps_of_colours(tmp_path: Path) -> None:
    """The extension's `t2ia_color_grid`: a square is 64 pixels where the shorter side has `processor_res`."""
    pytest.importorskip("cv2")
    (tmp_path / "color.safetensors").write_bytes(b"")
    catalogue = Catalogue(ServerSettings(controlnet_dir=str(tmp_path)))
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)

    def colours(width: int = 128, height: int = 128, **unit: Any) -> np.ndarray:
        own = {"image": encoded(Image.fromarray(pixels)), "model": "color", "module": "t2ia_color_grid", **unit}
        scripts = {"ControlNet": {"args": [own]}}
        (control,) = draft(catalogue=catalogue, alwayson_scripts=scripts, width=width, height=height).controls
        assert control.map_kind == "color" and control.image.size == (width, height)
        return np.unique(np.asarray(control.image).reshape(-1, 3), axis=0)

    usual = colours()
    assert len(usual) == 8 * 8
    for same in ({"processor_res": -1}, {"processor_res": 512}, {"module": "color"}, {"threshold_a": 64}):
        np.testing.assert_array_equal(colours(**same), usual)
    for resize_mode in ("Just Resize", "Crop and Resize", "Resize and Fill"):  # which add no colours at borders
        np.testing.assert_array_equal(colours(256, 256, resize_mode=resize_mode), usual)
    assert len(colours(processor_res=128)) == 2 * 2 == len(colours(pixel_perfect=True))
    assert len(colours(256, 128, pixel_perfect=True)) == 4 * 4 // 2  # 256 pixels, of which the middle is kept
    for wrong in (63, 2049, "512"):
        with pytest.raises(FastsdError, match=r"controlnet\[0\].processor_res"):
            colours(processor_res=wrong)


def test_t2i_adapters(tmp_path: Path) -> None:
    """They are units like ControlNets', by the names that the extension lists; its other modules are refused."""
    (tmp_path / "t2iadapter_canny_sd14v1.safetensors").write_bytes(bytes(2**20 + 3))
    name = f"t2iadapter_canny_sd14v1 [{hashlib.sha256(bytes(3)).hexdigest()[:8]}]"

    def asked(**unit: Any) -> Draft:
        own = {"image": png((64, 64)), "model": name, "module": "canny", **unit}
        catalogue = Catalogue(ServerSettings(controlnet_dir=str(tmp_path)))
        return draft(catalogue=catalogue, alwayson_scripts={"ControlNet": {"args": [own]}}, width=32, height=64)

    (control,) = asked(weight=0.8, guidance_end=0.5).controls
    assert control.path == str(tmp_path / "t2iadapter_canny_sd14v1.safetensors") and control.map_kind == "canny"
    assert control.parts == {"weight": 0.8, "start": 0.0, "end": 0.5}
    for wrong, said in (
        ({"module": "t2ia_style_clipvision"}, "no T2I-Adapter of styles is here"),
        ({"module": "clip_vision"}, "no T2I-Adapter of styles is here"),
        ({"module": "t2ia_sketch_pidi"}, "send the map that it would make, with module none"),
        ({"effective_region_mask": png()}, "act on the whole image"),
        ({"model": "t2iadapter_canny_sd14v1 [80bfd79b]"}, "the file of this name is another one"),
        ({"model": "t2iadapter_seg_sd14v1 [6387afb5]"}, "no such ControlNet"),
        ({"model": None}, "the name of a ControlNet or T2I-Adapter"),
    ):
        with pytest.raises(FastsdError, match=said):
            asked(**wrong)


def test_ip_adapters(tmp_path: Path) -> None:
    for name in ("canny.safetensors", "ip-adapter_sd15.safetensors", "image_encoder/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    catalogue = Catalogue(ServerSettings(controlnet_dir=str(tmp_path)))
    assert [one.name for one in catalogue.controlnets] == ["canny", "ip-adapter_sd15"]

    def asked(**unit: Any) -> Draft:
        own = {"image": png((64, 64)), "model": "ip-adapter_sd15", "module": "ip-adapter-auto", **unit}
        return draft(catalogue=catalogue, alwayson_scripts={"ControlNet": {"args": [own]}}, width=32, height=64)

    (plain,) = asked().image_prompts
    assert (plain.scale, plain.mask, plain.image.size) == (1.0, None, (64, 64)) and not asked().controls
    assert plain.path == str(tmp_path / "ip-adapter_sd15.safetensors") and not asked(enabled=False).image_prompts
    (masked,) = asked(module="ip-adapter_clip_sd15", weight=0.5, effective_region_mask=png((8, 8))).image_prompts
    assert masked.scale == 0.5 and masked.mask is not None and masked.mask.mode == "L"
    order = make_order(asked(), "a1111", catalogue.models[0], catalogue, Limits())
    assert len(order.image_prompts) == 1 and order.key is None
    for wrong, said in (
        ({"module": "ip-adapter_face_id"}, "no network of faces is here"),
        ({"guidance_start": 0.2}, "acts in all steps; it should be 0"),
        ({"guidance_end": 0.8}, "acts in all steps; it should be 1"),
        ({"weight": 99}, "weight"),
        ({"mask": png()}, "effective_region_mask is"),
        ({"effective_region_mask": 3}, "as base64"),
        ({"image": None}, "as base64"),
        ({"model": None}, "the name of an IP-Adapter"),
    ):
        with pytest.raises(FastsdError, match=said):
            asked(**wrong)


def test_a_control_image_of_another_shape_is_filled_with_the_colour_of_its_border() -> None:
    """A white line across black: its ends are few of the border's pixels, and the median is black."""
    image = Image.new("RGB", (64, 32))
    image.paste((255, 255, 255), (0, 15, 64, 17))
    filled = resize_control(image, (64, 64), 2)
    assert filled.size == (64, 64) and filled.getpixel((10, 3)) == (0, 0, 0) and filled.getpixel((10, 32)) != (0, 0, 0)
    assert filled.crop((0, 16, 64, 48)).tobytes() == image.tobytes()
    assert resize_control(image, (128, 64), 2) is image  # of the same shape: the call enlarges it
