"""Teachers and targets: whole, in part, and paired with another network by name."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import polyak
from deep import differences
from oracles import cosine


class Student(nn.Module):
    """An encoder, what comes after it, and a predictor that no teacher has (as in BYOL)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.projector = nn.Linear(8, 4)
        self.predictor = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.predictor(self.projector(self.encoder(x)))
        return answer


class Teacher(nn.Module):
    """The same encoder by another name, declared in another order; a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.trunk(x))
        return answer


def as_teacher(name: str) -> str | None:
    """Where a tensor of the student stands in the teacher."""
    if name.startswith("predictor."):
        return None
    return name.replace("encoder.", "trunk.").replace("projector.", "head.")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 6, dtype=dtype)).square().mean().backward()
        optimizer.step()


def prepared(**settings: object) -> tuple[Student, torch.optim.Optimizer, polyak.Average]:
    student = Student()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    average = polyak.Average(
        student,
        polyak.Exponential(decay=0.9, debias=False),
        **settings,  # type: ignore[arg-type]
    )
    average.follow(optimizer)
    return student, optimizer, average


# ── whole ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("every", [1, 5])
def test_cosine_teacher_is_the_recurrence(every: int) -> None:
    """Teacher <- m teacher + (1 - m) student, m from 0.9 to 1 along half a cosine, then for good.

    Looked at every fifth step the student of that step gets what the momenta of five steps leave.
    """
    total, steps = 300, 400
    student = Student().double()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    average = polyak.Average(student, polyak.Cosine(0.9, total=total))
    average.follow(optimizer, every=every)
    teacher = average.module()
    expected = {n: p.detach().numpy().copy() for n, p in student.named_parameters()}

    for step in range(1, steps + 1):
        train(student, optimizer)
        if step % every == 0:
            kept = float(
                np.prod([cosine(n, 0.9, total) for n in range(step - every + 1, step + 1)])
            )
            for name, live in student.named_parameters():
                expected[name] = kept * expected[name] + (1.0 - kept) * live.detach().numpy()
        if step in (every, 100, total, steps):
            for name, shown in teacher.named_parameters():
                np.testing.assert_allclose(shown.numpy(), expected[name], rtol=1e-11, atol=1e-13)
        if step == total:
            at_the_end = {n: p.clone() for n, p in teacher.named_parameters()}
    assert all(torch.equal(p, at_the_end[n]) for n, p in teacher.named_parameters())


def test_teacher_teaches_and_does_not_learn() -> None:
    """The student's gradients are those against a constant target; the teacher has none."""
    student, optimizer, average = prepared()
    train(student, optimizer, 3)
    teacher = average.module()
    x = torch.randn(8, 6)

    optimizer.zero_grad()
    (student(x) - teacher(x)).square().mean().backward()
    gradients = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    assert len(gradients) == len(list(student.parameters()))
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())

    plain = Student().eval()
    plain.load_state_dict(average.weights())
    target = plain(x).detach()
    optimizer.zero_grad()
    (student(x) - target).square().mean().backward()
    for ours, parameter in zip(gradients, student.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-6, atol=1e-8)


def test_hard_target_is_an_average_without_memory() -> None:
    """Copied at every fourth step with `copy_to`, or shown by one that keeps nothing: same bits."""
    student = Student()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    sampled = polyak.Average(student, polyak.Exponential(decay=0.0))
    sampled.follow(optimizer, every=4)
    shown = sampled.module()
    latest = polyak.Average(student, polyak.Exponential(decay=0.0))
    latest.follow(optimizer)
    target = Student()
    latest.copy_to(target)
    for step in range(1, 14):
        train(student, optimizer)
        if step % 4 == 0:
            latest.copy_to(target)
        ours, theirs = dict(shown.named_parameters()), dict(target.named_parameters())
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # Thirteen steps: both stand at the twelfth.
    assert not torch.equal(target.projector.weight, student.projector.weight)


# ── in part ──────────────────────────────────────────────────────────────────────────────────────


def test_teacher_of_which_only_a_part_is_averaged() -> None:
    """With include= the rest of the teacher is the live network, at all times."""
    student, optimizer, average = prepared(include="encoder.*")
    teacher = average.module()
    train(student, optimizer, 5)
    live, shown = student.state_dict(), teacher.state_dict()
    assert set(average.tensors) == {name for name in live if name.startswith("encoder.")} - {
        "encoder.1.num_batches_tracked"
    }
    for name in live:
        expected = average.tensors.get(name, live[name])
        assert torch.equal(shown[name], expected), name
    assert not torch.equal(shown["encoder.0.weight"], live["encoder.0.weight"])


def test_teacher_of_a_submodule_has_its_names() -> None:
    """An average of a part is one of a model like any other: the teacher is that part."""
    student = Student()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    average = polyak.Average(student.encoder, polyak.Exponential(decay=0.9))
    average.follow(optimizer)
    teacher = average.module()
    train(student, optimizer, 5)
    assert isinstance(teacher, nn.Sequential)
    assert set(teacher.state_dict()) == set(student.encoder.state_dict())
    for name, tensor in average.tensors.items():
        assert torch.equal(teacher.state_dict()[name], tensor)


# ── another network, by name ─────────────────────────────────────────────────────────────────────

RENAMED = {
    "encoder.0.weight": "trunk.0.weight",
    "encoder.0.bias": "trunk.0.bias",
    "encoder.1.weight": "trunk.1.weight",
    "encoder.1.bias": "trunk.1.bias",
    "encoder.1.running_mean": "trunk.1.running_mean",
    "encoder.1.running_var": "trunk.1.running_var",
    "encoder.1.num_batches_tracked": "trunk.1.num_batches_tracked",
    "projector.weight": "head.weight",
    "projector.bias": "head.bias",
}


@pytest.mark.parametrize(
    "names",
    [as_teacher, {**RENAMED, "predictor.weight": None, "predictor.bias": None}],
    ids=["function", "mapping"],
)
def test_teacher_of_another_class_follows_by_name(
    names: Callable[[str], str | None] | dict[str, str | None],
) -> None:
    """A factory and names make any network a teacher; the predictor stays at home."""
    student, optimizer, average = prepared()
    teacher = average.module(factory=Teacher, names=names)
    assert isinstance(teacher, Teacher)
    for _ in range(3):
        train(student, optimizer)
        ours = average.weights()
        for name, there in RENAMED.items():
            assert torch.equal(ours[name], teacher.state_dict()[there])
    assert not teacher.training


def test_coverage_says_what_was_paired_and_what_was_not() -> None:
    """Left out on purpose is not missing; what stands alone is named on its side."""
    student, optimizer, average = prepared()
    train(student, optimizer, 3)
    target = Teacher()
    coverage = average.copy_to(target, names=as_teacher)
    assert dict(coverage.pairs) == RENAMED
    assert coverage.complete

    head = target.head.weight.clone()
    coverage = average.copy_to(
        target, names=lambda name: name.replace("encoder.", "trunk."), partial=True
    )
    assert not coverage.complete
    assert set(coverage.only_in_average) == {
        "predictor.weight",
        "predictor.bias",
        "projector.weight",
        "projector.bias",
    }
    assert coverage.only_in_module == ("head.bias", "head.weight")
    assert "only in the module: head.weight" in str(coverage)
    assert torch.equal(target.head.weight, head)


def test_part_of_a_teacher_without_a_partner_keeps_its_own_weights() -> None:
    """With partial= the teacher's own head is its own, and its trunk follows."""
    student, optimizer, average = prepared()
    kept = Teacher()
    own = kept.head.weight.clone()
    teacher = average.module(
        factory=lambda: kept, names=lambda name: name.replace("encoder.", "trunk."), partial=True
    )
    train(student, optimizer, 3)
    assert isinstance(teacher, Teacher)
    assert torch.equal(teacher.head.weight, own)
    assert torch.equal(teacher.trunk.get_parameter("0.weight"), average.tensors["encoder.0.weight"])
    assert not torch.equal(
        teacher.trunk.get_parameter("0.weight"), student.encoder.get_parameter("0.weight")
    )


# ── failures of the field ────────────────────────────────────────────────────────────────────────


class Adapted(nn.Module):
    """A frozen base with two adapters of one shape; the reference stands first."""

    def __init__(self) -> None:
        super().__init__()
        self.reference_up, self.reference_down = nn.Linear(2, 6, False), nn.Linear(6, 2, False)
        self.base = nn.Linear(6, 6)
        self.policy_down, self.policy_up = nn.Linear(6, 2, False), nn.Linear(2, 6, False)
        for frozen in (self.base, self.reference_down, self.reference_up):
            frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.base(x) + self.policy_up(self.policy_down(x))
        return answer


def test_i2_reference_adapter_inside_the_same_model_is_paired_by_name() -> None:
    """Declared in another order than the policy, so pairs by position would be the wrong ones."""
    model = Adapted()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    average = polyak.Average(model, polyak.Exponential(decay=0.5, debias=False))
    average.follow(optimizer)
    train(model, optimizer, 4)
    assert set(average.tensors) == {"policy_down.weight", "policy_up.weight"}

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    coverage = average.copy_to(
        model,
        names=lambda name: (
            name.replace("policy", "reference") if name.startswith("policy") else None
        ),
        partial=True,
    )
    assert dict(coverage.pairs) == {
        "policy_down.weight": "reference_down.weight",
        "policy_up.weight": "reference_up.weight",
    }
    after = model.state_dict()
    for part in ("down", "up"):
        expected = average.tensors[f"policy_{part}.weight"]
        assert torch.equal(after[f"reference_{part}.weight"], expected)
        assert not torch.equal(after[f"reference_{part}.weight"], after[f"policy_{part}.weight"])
    untouched = {name: t for name, t in after.items() if not name.startswith("reference")}
    assert list(differences(untouched, {name: before[name] for name in untouched})) == []
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "policy_down.weight",
        "policy_up.weight",
    ]


def test_i4_target_of_which_a_part_would_go_stale_is_refused() -> None:
    """An average of the heads alone must not pass for one of the network; nothing is written."""
    student = Student()
    heads = nn.ModuleDict({"projector": student.projector, "predictor": student.predictor})
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    average = polyak.Average(heads, polyak.Exponential(decay=0.9))
    average.follow(optimizer)
    train(student, optimizer, 3)

    target = Student()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    for refused in (
        lambda: average.copy_to(target),
        lambda: average.copy_to(target, share=0.1),
        lambda: average.module(factory=Student),
    ):
        with pytest.raises(polyak.MatchError, match=r"7 only in the module \['encoder"):
            refused()
    assert list(differences(dict(target.state_dict()), before)) == []

    coverage = average.copy_to(target, partial=True)
    assert all(name.startswith("encoder.") for name in coverage.only_in_module)
    assert len(coverage.only_in_module) == 7


def test_i4_what_is_not_averaged_reaches_a_target_from_the_live_network() -> None:
    """Averaging the heads of a whole network leaves no part of its target behind."""
    student, optimizer, average = prepared(exclude="encoder.*")
    target = Student()
    train(student, optimizer, 3)
    assert average.copy_to(target).complete
    for name, live in student.encoder.state_dict().items():
        assert torch.equal(target.encoder.state_dict()[name], live)
    assert torch.equal(target.projector.weight, average.tensors["projector.weight"])
