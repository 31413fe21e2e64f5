"""The verb `convert`: its parser. The implementation is imported after the arguments are parsed."""

from agevlm.arguments import VerbParser


def main(argv: list[str] | None = None) -> None:
    """Convert a published ConvLLaVA or MobileVLM V2 into a checkpoint that transformers loads.

    agevlm convert convllava ConvLLaVA/ConvLLaVA-sft-768 --output convllava-768 --read-bin
    agevlm convert mobilevlm-v2 mtgv/MobileVLM_V2-1.7B --output mobilevlm-1.7b --read-bin
    """
    parser = VerbParser("convert", main.__doc__)
    parser.add_argument("system", choices=("convllava", "mobilevlm-v2"))
    parser.add_argument("source", metavar="SRC", help="folder or Hub repository in the authors' layout")
    parser.add_output("folder to make")
    parser.add_argument("--revision", help="branch, tag or commit of SRC")
    parser.add_argument(
        "--read-bin",
        action="store_true",
        help="read pytorch_model.bin where there are no safetensors. It is a pickle: torch.load(weights_only=True) "
        "builds its tensors and refuses whatever else it asks for",
    )
    tower = parser.add_mutually_exclusive_group()
    tower.add_argument(
        "--vision-tower",
        metavar="ID_OR_DIR",
        help="convllava: the tower (default: the `mm_vision_tower` of SRC's config.json, as the authors' loader does)",
    )
    tower.add_argument(
        "--vision-from-checkpoint",
        action="store_true",
        help="convllava: the tower inside SRC, which the authors' loader ignores",
    )
    arguments = parser.parse_args(argv)
    if arguments.system != "convllava" and (arguments.vision_tower or arguments.vision_from_checkpoint):
        parser.error("MobileVLM's tower is inside the checkpoint: leave out the options of convllava's")

    from .convert import run_verb

    run_verb(arguments)
