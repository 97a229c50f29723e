"""Two threads become one where another process holds a core: csrc/ops/stall.h, by its clock."""

import shutil
import subprocess
from pathlib import Path

import pytest

HEADER = Path(__file__).parents[2] / "csrc" / "ops" / "stall.h"
PROGRAM = """
#include <cstdio>
#include "stall.h"

static int64_t clock_ns;
static int64_t fake_now() { return clock_ns; }
using Stalls = gpu_poor::StallsBy<fake_now>;

static void pass_ms(int ms) { clock_ns += ms * 1000000; }

/* A region whose calling thread works for a time and then waits. */
static void region(int work_ms, int wait_ms)
{
    Stalls::Region r;
    pass_ms(work_ms);
    r.share_done();
    pass_ms(wait_ms);
}

#define EXPECT(what) if (!(what)) return std::printf("line %d: %s\\n", __LINE__, #what), 1

/* So many regions of 1 ms of work that are over 3 ms later. */
static void stalls(int n)
{
    for (int i = 0; i < n; i++) region(1, 3);
}

int main()
{
    EXPECT(!Stalls::alone());
    for (int i = 0; i < 1000; i++) { /* 3 ms in 20, single ones: chance */
        stalls(1);
        pass_ms(16);
        EXPECT(!Stalls::alone());
    }
    for (int i = 0; i < 100; i++) region(20, 30); /* waits not much longer than the work are none */
    EXPECT(!Stalls::alone());
    stalls(8);
    EXPECT(!Stalls::alone());
    stalls(2); /* 40 ms, three quarters of them lost */
    EXPECT(Stalls::alone());
    pass_ms(101);
    EXPECT(!Stalls::alone());
    for (int rest = 200; rest <= 4000; rest *= 2) { /* still there: ever longer */
        stalls(8);
        EXPECT(!Stalls::alone());
        stalls(2);
        const int longest = rest < 1000 ? rest : 1000;
        pass_ms(longest - 4);
        EXPECT(Stalls::alone());
        pass_ms(5);
        EXPECT(!Stalls::alone());
    }
    pass_ms(300);
    stalls(8);
    EXPECT(!Stalls::alone()); /* it was gone: as at the beginning */
    stalls(2);
    EXPECT(Stalls::alone());
    pass_ms(96);
    EXPECT(Stalls::alone());
    pass_ms(5);
    EXPECT(!Stalls::alone());
    {   /* what was before a restart does not count */
        Stalls::Region r;
        pass_ms(50);
        r.restart();
        pass_ms(30);
    }
    EXPECT(Stalls::alone());
    return 0;
}
"""


@pytest.mark.skipif(not (HEADER.exists() and shutil.which("g++")), reason="no g++, or no sources")
def test_stalls(tmp_path):
    (tmp_path / "stall.cpp").write_text(PROGRAM)
    build = ["g++", "-std=c++17", "-Wall", "-Werror", "-pthread", f"-I{HEADER.parent}"]
    program = str(tmp_path / "stall")
    subprocess.run([*build, str(tmp_path / "stall.cpp"), "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
