"""The check that a configuration is 3D."""

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager


def require_3d(configuration_manager: ConfigurationManager, what: str) -> None:
    """Raises where a configuration's patch is not 3D.

    Args:
        configuration_manager: The configuration.
        what: Name of the trainer that needs 3D.

    Raises:
        NotImplementedError: The patch has another number of axes than three.
    """
    patch_size = list(configuration_manager.patch_size)
    if len(patch_size) != 3:
        raise NotImplementedError(
            f"{what} expected a 3D configuration, got one with the {len(patch_size)}D patch {patch_size}; "
            "train 3d_fullres or 3d_lowres instead."
        )
