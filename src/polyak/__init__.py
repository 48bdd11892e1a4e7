"""Averages of the weights of neural networks: right by algebra, cheap, resumable."""

from ._average import Average as Average
from ._average import Averages as Averages
from ._average import refresh_norms as refresh_norms
from ._bias import bias_corrected as bias_corrected
from ._errors import ArgumentError as ArgumentError
from ._errors import AveragingError as AveragingError
from ._errors import AveragingWarning as AveragingWarning
from ._errors import MatchError as MatchError
from ._errors import OrderError as OrderError
from ._fit import Fit as Fit
from ._fit import Tail as Tail
from ._follow import Follower as Follower
from ._identities import convert as convert
from ._merge import Ingredient as Ingredient
from ._merge import Merge as Merge
from ._merge import merge as merge
from ._pairing import Coverage as Coverage
from ._posthoc import Reconstruction as Reconstruction
from ._posthoc import reconstruct as reconstruct
from ._profiles import Profile as Profile
from ._profiles import profile as profile
from ._ranks import check_ranks as check_ranks
from ._ranks import reduce_buffers as reduce_buffers
from ._report import Report as Report
from ._report import TensorReport as TensorReport
from ._resume import load_checkpoint as load_checkpoint
from ._save import load_weights as load_weights
from ._save import save as save
from ._schedules import After as After
from ._schedules import Cosine as Cosine
from ._schedules import CountRamp as CountRamp
from ._schedules import Exponential as Exponential
from ._schedules import ExponentialRamp as ExponentialRamp
from ._schedules import HalfLifeRamp as HalfLifeRamp
from ._schedules import InverseGamma as InverseGamma
from ._schedules import Polynomial as Polynomial
from ._schedules import Power as Power
from ._schedules import Schedule as Schedule
from ._schedules import Uniform as Uniform
from ._schedules import gamma_from_sigma_rel as gamma_from_sigma_rel
from ._schedules import sigma_rel_from_gamma as sigma_rel_from_gamma
from ._serving import SnapshotReport as SnapshotReport
from ._snapshots import Snapshots as Snapshots
from ._soup import Line as Line
from ._soup import Soup as Soup
from ._soup import Tried as Tried
from ._soup import line as line
from ._soup import soup as soup
from ._sweep import Point as Point
from ._sweep import Sweep as Sweep
from ._sweep import sweep as sweep
from ._window import Window as Window

__all__ = [
    "After",
    "ArgumentError",
    "Average",
    "Averages",
    "AveragingError",
    "AveragingWarning",
    "Cosine",
    "CountRamp",
    "Coverage",
    "Exponential",
    "ExponentialRamp",
    "Fit",
    "Follower",
    "HalfLifeRamp",
    "Ingredient",
    "InverseGamma",
    "Line",
    "MatchError",
    "Merge",
    "OrderError",
    "Point",
    "Polynomial",
    "Power",
    "Profile",
    "Reconstruction",
    "Report",
    "Schedule",
    "SnapshotReport",
    "Snapshots",
    "Soup",
    "Sweep",
    "Tail",
    "TensorReport",
    "Tried",
    "Uniform",
    "Window",
    "bias_corrected",
    "check_ranks",
    "convert",
    "gamma_from_sigma_rel",
    "line",
    "load_checkpoint",
    "load_weights",
    "merge",
    "profile",
    "reconstruct",
    "reduce_buffers",
    "refresh_norms",
    "save",
    "sigma_rel_from_gamma",
    "soup",
    "sweep",
]
