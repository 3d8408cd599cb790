"""What users read when a configuration is wrong."""

from __future__ import annotations

from percov2.training.config_errors import explain

NESTED = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'percov2.training.AutoencoderStage':
        Parser key "autoencoder":
          Problem with given class_path 'percov2.analysis.autoencoder.PatchAutoencoder':
            {leaf}
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>"""


def test_an_unknown_option_of_a_nested_class_names_field_class_and_neighbour() -> None:
    line = explain(NESTED.format(leaf="Option 'encoder_widht' is not accepted"), [])
    assert line == (
        "model.autoencoder (percov2.analysis.autoencoder.PatchAutoencoder) has no option "
        "'encoder_widht', the nearest known name is 'encoder_width'"
    )


def test_a_wrong_type_names_the_field_and_the_type() -> None:
    leaf = "Parser key \"encoder_width\":\n              Expected a <class 'int'>. Got value: wide"
    line = explain(NESTED.format(leaf=leaf), [])
    assert line == "model.autoencoder.encoder_width: expected a <class 'int'>. Got value: wide"


def test_a_value_that_fits_none_of_several_types_names_them_all() -> None:
    message = """Parser key "trainer.precision":
  Does not validate against any of the Union subtypes
  Subtypes: [typing.Literal[64, 32, 16], typing.Literal['bf16-mixed'], <class 'NoneType'>]
  Errors:
    - Expected a <class 'int'>
    - Expected a typing.Literal['bf16-mixed', '32-true']
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: bf16mixed"""
    assert explain(message, []) == (
        "trainer.precision: expected a <class 'int'> or a typing.Literal['bf16-mixed', '32-true']. "
        "Got value: bf16mixed"
    )


def test_the_inner_field_is_what_is_wrong() -> None:
    message = """Parser key "trainer.strategy":
  Does not validate against any of the Union subtypes
  Errors:
    - Expected a <class 'str'>
    - Problem with given class_path 'percov2.training.strategy.ZeroStrategy':
        Parser key "stage":
          Expected a typing.Literal[1, 2, 3]. Got value: 4
  Given value: NestedArg(key='stage', val='4')"""
    assert explain(message, []) == (
        "trainer.strategy.stage: expected a typing.Literal[1, 2, 3]. Got value: 4"
    )


def test_an_unknown_option_of_a_group() -> None:
    line = explain(
        "Group 'trainer' does not accept option 'max_stepz'", ["trainer.max_steps", "vars.max"]
    )
    assert line == "trainer has no option 'max_stepz', the nearest known name is 'max_steps'"


def test_an_unknown_option_of_the_command_line() -> None:
    line = explain("unrecognized arguments: --trainer.max_stepz=3", ["trainer.max_steps", "x"])
    assert line == "no option --trainer.max_stepz, the nearest known name is 'trainer.max_steps'"


def test_an_unknown_form_is_passed_on_in_one_line() -> None:
    assert explain("something\n  else", ["a"]) == "something else"


def test_a_class_s_own_refusal_stands_alone() -> None:
    message = (
        "Does not validate against any of the Union subtypes\n"
        "Subtypes: [<class 'LightningDataModule'>, <class 'NoneType'>]\nErrors:\n"
        "  - no shard matches 'x*.tar':\n    give the path of .tar files\n"
        "  - Expected a <class 'NoneType'>\nGiven value type: <class 'Namespace'>"
    )
    assert explain(message, []) == "no shard matches 'x*.tar': give the path of .tar files"
