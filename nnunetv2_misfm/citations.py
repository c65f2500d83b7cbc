"""What to cite, as checkpoints record it."""

NNUNET = "Isensee et al., nnU-Net, Nature Methods 18, 203-211 (2021)"
MISFM = (
    "Wang et al., MIS-FM: 3D Medical Image Segmentation using Foundation Models Pretrained on a Large-Scale "
    "Unannotated Dataset, arXiv:2306.16925 (2023)"
)
# The follow-up of MIS-FM: FMUNet, and the map of a grid of blocks
FMUNET = (
    "Wang et al. on Volume Fusion and FMUNet, IEEE Transactions on Image Processing 34, 6041-6052 (2025), "
    "DOI 10.1109/TIP.2025.3610249"
)
MODELS_GENESIS = "Zhou et al., Models Genesis, Medical Image Analysis 67, 101840 (2021), arXiv:2004.07882"
PATCH_SWAPPING = (
    "Chen et al., Self-supervised learning for medical image analysis using image context restoration, Medical Image "
    "Analysis 58, 101539 (2019)"
)
MIM = "Chen et al., Masked Image Modeling Advances 3D Medical Image Analysis, WACV 2023, 1969-1979, arXiv:2204.11716"
UNETR = "Hatamizadeh et al., UNETR: Transformers for 3D Medical Image Segmentation, WACV 2022, arXiv:2103.10504"
SWIN_UNETR = (
    "Hatamizadeh et al., Swin UNETR: Swin Transformers for Semantic Segmentation of Brain Tumors in MRI Images, "
    "BrainLes 2021 (published 2022), arXiv:2201.01266"
)
HERMES = (
    "Gao et al., Training Like a Medical Resident: Context-Prior Learning Toward Universal Medical Image Segmentation, "
    "CVPR 2024, arXiv:2306.02416"
)
