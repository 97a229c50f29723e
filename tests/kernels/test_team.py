"""Loops that threads share: csrc/ops/team.h, on std::thread in torch's place."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
#: Each region on new threads, the calling one with the first share: as torch's are, only slower.
THREADS = """
#include <functional>
#include <thread>
#include <vector>
namespace torch::stable {
inline int64_t get_num_threads() { return 4; }
using Share = std::function<void(int64_t, int64_t)>;
inline void parallel_for(int64_t begin, int64_t end, int64_t, const Share &f)
{
    std::vector<std::thread> others;
    for (int64_t i = begin + 1; i < end; i++) others.emplace_back([&, i] { f(i, i + 1); });
    f(begin, begin + 1);
    for (std::thread &other : others) other.join();
}
}
"""
PROGRAM = """
#include <cstdio>
#include <stdexcept>
#include <vector>
#include "ops/team.h"
using gpu_poor::Team;

#define EXPECT(what) if (!(what)) return std::printf("line %d: %s\\n", __LINE__, #what), 1

/* How many of n numbers are counted up 200 times: in plain memory, so a race is a wrong sum. */
static int64_t counted(int64_t n, int64_t least)
{
    std::vector<int64_t> seen(static_cast<size_t>(n));
    Team::run([&] {
        for (int round = 0; round < 200; round++)
            Team::loop(n, least, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; i++) seen[static_cast<size_t>(i)]++;
                Team::loop(10, 1, [](int64_t, int64_t) {}); /* one inside is the thread's own */
            });
    });
    int64_t right = 0;
    for (int64_t times : seen) right += times == 200;
    return right;
}

static int work()
{
    for (int64_t n : {1, 2, 3, 4, 5, 7, 64, 1001})
        for (int64_t least : {1, 3, 100}) EXPECT(counted(n, least) == n);
    for (int64_t at : {0, 99}) { /* of whichever thread; afterwards it works as before */
        bool thrown = false;
        int loops = 0;
        try {
            Team::run([&] {
                Team::loop(100, 1, [&](int64_t begin, int64_t end) {
                    if (begin <= at && at < end) throw std::runtime_error("in a loop");
                });
                loops++;
            });
        } catch (const std::runtime_error &) {
            thrown = true;
        }
        EXPECT(thrown && loops == 0);
        EXPECT(counted(50, 1) == 50);
    }
    return 0;
}

int main()
{
    std::vector<int> failed(3);
    std::vector<std::thread> callers;
    for (size_t i = 0; i < 3; i++) callers.emplace_back([&, i] { failed[i] = work(); });
    for (std::thread &caller : callers) caller.join();
    return failed[0] | failed[1] | failed[2];
}
"""


@pytest.mark.skipif(not (CSRC.exists() and shutil.which("g++")), reason="no g++, or no sources")
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_team(tmp_path, sanitizer):
    stable = tmp_path / "torch" / "csrc" / "stable"
    stable.mkdir(parents=True)
    (stable / "ops.h").write_text(THREADS)
    (tmp_path / "team.cpp").write_text(PROGRAM)
    program = str(tmp_path / "team")
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-pthread", f"-fsanitize={sanitizer}"]
    includes = [f"-I{tmp_path}", f"-I{CSRC}"]
    subprocess.run(
        ["g++", *flags, *includes, str(tmp_path / "team.cpp"), "-o", program], check=True
    )
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel lays memory out as gcc's ThreadSanitizer does not expect")
    assert done.returncode == 0, done.stdout + done.stderr[:3000]
