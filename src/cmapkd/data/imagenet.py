"""ImageNet as users have it: folders of WordNet ids or class numbers, numbered as the 1,000 classes are."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cmapkd.config import ConfigError
from cmapkd.data.classes import Classes
from cmapkd.data.folders import FolderSource, open_images
from cmapkd.data.places import nearest
from cmapkd.data.reading import Folder, is_image_name
from cmapkd.data.splits import pick_split
from cmapkd.data.stored import SampleFilter

SPLITS = ("train", "val", "validation", "test", "dev")
NUM_CLASSES = 1_000


def open_imagenet(
    rest: str,
    *,
    split: str | None,
    split_is_own: bool = False,
    classes: Literal["all", "present"] = "all",
    keep: SampleFilter | None = None,
) -> FolderSource:
    """A folder or zip of class folders, or a folder that holds `train` and `val` of them.

    Class folders are WordNet ids (`n01440764`: ImageNet, -R, -A, -Sketch) or numbers (`0` to `999`: ImageNet-V2). A
    label is the class's place among the 1,000 ids in sorted order, and its name that of open_clip.

    Args:
        split: which of the folders inside; a folder without them is one split as it is.
        split_is_own: the user wrote the split, so a folder without it is an error.
        classes: `present` numbers only the classes that have a folder, in the same order: the protocol of ImageNet-R
            and -A, where a model chooses among 200 names.
    Raises:
        ConfigError: nothing is there, no class folders, or a class folder that is none of the 1,000.
    """
    path = Path(rest).expanduser()
    shown = f"imagenet:{rest}"
    if path.is_dir():
        found = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and entry.name in SPLITS)
        if found:
            chosen = pick_split(split, found, shown)
            path, shown = path / chosen, f"{shown}@{chosen}"
        elif split_is_own:
            raise ConfigError(
                f"{shown} holds no folder of a split, so '@{split}' cannot be read. {nearest(f'{rest}/.')}"
            )
    elif split_is_own:
        raise ConfigError(f"{shown} is one split as it is: leave '@{split}' out")
    folders = _class_folders(path)
    if not folders:
        raise ConfigError(
            f"{shown} holds no class folders, so its images have no labels: sort them into folders of their WordNet "
            "ids (ILSVRC's flat val folder comes with a list of labels), or read them without labels with folder:."
        )
    return FolderSource(str(path), keep=keep, classes=_classes(folders, classes), shown=shown)


def _class_folders(path: Path) -> set[str]:
    images = open_images(str(path), "imagenet:")
    if isinstance(images, Folder):
        return {entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    return {name.split("/")[-2] for name in images.members if is_image_name(name) and "/" in name}


def _classes(folders: set[str], which: Literal["all", "present"]) -> Classes:
    import open_clip  # takes seconds
    from timm.data import ImageNetInfo

    ids = ImageNetInfo("imagenet-1k").label_names()
    names = tuple(open_clip.IMAGENET_CLASSNAMES)
    assert len(ids) == len(names) == NUM_CLASSES
    numbered = bool(folders) and all(folder.isdecimal() for folder in folders)
    keys = [str(number) for number in range(NUM_CLASSES)] if numbered else ids
    places = [place for place, key in enumerate(keys) if which == "all" or key in folders]
    return Classes(tuple(names[place] for place in places), {keys[p]: number for number, p in enumerate(places)})
