"""Build a dataset: sources -> curated, aligned, encoded WebDataset shards with manifest, norm stats and report.

Runs on Ray, on this machine or on a cluster. The same recordings and config give the same bytes, however often the
build was killed, whatever was there before and however many workers took part. Two phases: *curate* and *encode* work
episode by episode into `<out>.staging`, where everything says what it was made from, so that a build that is started
again does only what is missing or has changed; *pack* then writes the dataset from what was accepted.

As a job array: give every task the same config and its own `partition=i/n`. Tasks may run at once, on machines that see
the same files, and may be repeated; whichever is the last to end packs.
"""

import logging

from configs.loader import UserError, run_command

from .build_config import BuildConfig, build_identity
from .dataset import DATASET_YAML, read_info
from .resolve import Listing, open_sources, resolve, staging_folder
from .staging import digest

logger = logging.getLogger(__name__)


def main(config: BuildConfig) -> int:
    sources, listing = open_sources(config)
    if _is_there_without_staging(config, listing):
        logger.info("%s is up to date: the same config over the same episodes built it", config.out)
        return 0
    plan = resolve(config, sources, listing)
    from .build_stages import go_through  # brings torch and Ray: seconds that no mistake above need wait for

    go_through(config, plan, listing)
    return 0


def _is_there_without_staging(config: BuildConfig, listing: Listing) -> bool:
    """Whether the dataset is there and nothing else tells whether it is out of date: its episodes' names have to do."""
    out = config.out
    if not (out / DATASET_YAML).is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out}: exists and is not a dataset, so it will not be touched; choose another `out`.")
        return False
    if config.overwrite:
        return False
    info, build = read_info(out), build_identity(config)
    changed = sorted(key for key in info.build.keys() | build.keys() if info.build.get(key) != build.get(key))
    if changed:
        raise UserError(
            f"{out}: holds a dataset built from another config ({', '.join(changed)} changed); choose another `out`, "
            "or replace it with overwrite=true."
        )
    names = {name: (len(episodes), digest(list(episodes))) for name, episodes in listing.items()}
    is_same = names == {name: (one.episodes, one.listing_sha256) for name, one in info.sources.items()}
    return is_same and not staging_folder(out).exists()


if __name__ == "__main__":
    run_command(main, BuildConfig, description=__doc__)
