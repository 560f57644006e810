"""Run the repository's commands from the clone's root: as a user would, in a subprocess, or in this one."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo" / "model"
QUICK = "--max_train_steps 3 --num_forget_images 8 --num_retain_images 8 --num_inference_steps 4".split()
QUICK += ["--train_batch_size", "4"]


def start(*words, cwd=ROOT, **environment):
    """The running process of ``words``; ``python``, ``accelerate`` and ``torchrun`` are this environment's own."""
    modules = {"accelerate": "accelerate.commands.accelerate_cli", "torchrun": "torch.distributed.run"}
    words = [str(word) for word in words]
    if words[0] in modules:
        words[:1] = ["python", "-m", modules[words[0]]]
    if words[0] == "python":
        words[0] = sys.executable
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=cwd, env=os.environ | environment, **pipes)


def run(*words, check=True, cwd=ROOT, **environment):
    """The finished process of ``words``, as of ``subprocess.run``."""
    process = start(*words, cwd=cwd, **environment)
    out, err = process.communicate()
    if check and process.returncode:
        raise AssertionError(f"{' '.join(map(str, words))} failed with {process.returncode}:\n{out}\n{err}")
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def here(*words, check=True, cwd=ROOT, **environment):
    """As :func:`run`, for ``python …``, but in this process, whose imports are done: each start takes seconds.

    The script runs as ``__main__`` with its own arguments, output, working directory and environment (which libraries
    that are imported already do not read again). Each command is typed as a process of its own by some test too.
    """
    from accelerate.state import AcceleratorState

    words = [str(word) for word in words]
    assert words[0] == "python", words
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = sys.argv, sys.path[:], dict(os.environ), os.getcwd()
    os.environ |= environment
    os.chdir(cwd)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if words[1] == "-c":
                sys.argv = ["-c", *words[3:]]
                exec(compile(words[2], "<string>", "exec"), {"__name__": "__main__"})
            elif words[1] == "-m":
                sys.argv = words[2:]
                runpy.run_module(words[2], run_name="__main__", alter_sys=True)
            else:
                sys.argv = words[1:]
                runpy.run_path(words[1], run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=err)
        except BaseException:
            code = 1
            traceback.print_exc(file=err)
        finally:
            sys.argv, sys.path[:] = before[:2]
            os.environ.clear()
            os.environ.update(before[2])
            os.chdir(before[3])
            AcceleratorState._reset_state(reset_partial_state=True)  # the next command may ask for another precision
    done = subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
    if check and code:
        raise AssertionError(f"{' '.join(words)} failed with {code}:\n{done.stdout}\n{done.stderr}")
    return done


def together(*commands, cwd):
    """The finished commands of one fresh process, whose working directory and packages are those of ``cwd``: each is
    run there as :func:`here` does.
    """
    lines = [[str(word) for word in words] for words in commands]
    code = f"""import json, sys
from shell import here
found = [here(*words, check=False, cwd={str(cwd)!r}) for words in json.loads(sys.argv[1])]
print(json.dumps([[one.args, one.returncode, one.stdout, one.stderr] for one in found]))"""
    done = run("python", "-c", code, json.dumps(lines), cwd=cwd, PYTHONPATH=str(ROOT / "tests"))
    return [subprocess.CompletedProcess(*one) for one in json.loads(done.stdout.splitlines()[-1])]


def erase(output, *more, concept="airplane", **options):
    """A short erasure of the demo model into ``output``; returns what :func:`here` does."""
    return here(
        "python", "erase_concept.py", "--pretrained_model_name_or_path", "demo", "--concept", concept,
        "--output_dir", output, "--data_dir", Path(output).parent / "data", *QUICK, *more, **options,
    )  # fmt: skip
