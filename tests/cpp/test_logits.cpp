// reliability, token_stats and row_max against the naive operators, with every instruction set of this machine.
#include <algorithm>

#include "harness.h"
#include "logits_cases.h"
#include "parallel_for.h"

namespace {

TEST(token_stats_agree_with_the_naive_ones) {
  Random random(1);
  for (int n = 0; n < 500; ++n) {
    const Case c = make_case(random);
    TokenStats want;
    naive::token_stats(want.args(c));
    for (const std::string& isa : instruction_sets()) {
      CHECK(set_instruction_set(isa));
      const std::string where = isa + " #" + std::to_string(n) + " " + c.what;
      TokenStats got, again;
      compute(got.args(c), kOneThread);
      compute(again.args(c), kThreeThreads);
      got.check(where, want);
      for (size_t f = 0; f < got.floats.size(); ++f)
        check_equal(where + " on three threads", kFloatNames[f], again.floats[f], got.floats[f]);
    }
  }
}

TEST(reliability_agrees_with_the_naive_one) {
  Random random(2);
  for (int n = 0; n < 500; ++n) {
    const ReliabilityCase c = make_reliability_case(random);
    Reliability want;
    naive::reliability(c.args(want));
    for (const std::string& isa : instruction_sets()) {
      CHECK(set_instruction_set(isa));
      const std::string where = isa + " #" + std::to_string(n) + " " + c.logits.what;
      Reliability got, again;
      compute(c.args(got), kOneThread);
      compute(c.args(again), kThreeThreads);
      got.check(where, want);
      check_equal(where + " on three threads", "drift", again.drift_values(), got.drift_values());
      check_equal(where + " on three threads", "rewards", again.rewards, got.rewards);
    }
  }
}

TEST(row_max_reads_the_rows) {
  for (const std::string& isa : instruction_sets()) {
    CHECK(set_instruction_set(isa));
    Random random(3);
    for (int n = 0; n < 100; ++n) {
      Case c = make_case(random);
      std::vector<float> student(static_cast<size_t>(c.positions)), teacher(student);
      compute(RowMaxArgs{c.pair(), c.positions, student.data(), teacher.data()}, kOneThread);
      for (int64_t at = 0; at < c.positions; ++at) {
        double most = -naive::kInf;
        bool nan = false;
        for (int64_t v = 0; v < c.vocab_size; ++v) {
          most = std::max(most, naive::value(c.student.view, at, v));
          nan |= std::isnan(naive::value(c.student.view, at, v));
        }
        CHECK(nan || student[static_cast<size_t>(at)] == static_cast<float>(most));
      }
    }
  }
}

TEST(no_positions_are_no_work) {
  Random random(4);
  Case c = make_case(random);
  c.positions = 0;
  for (const int64_t count : {0, 3}) {
    Reliability outputs;
    compute(outputs.args(c, {count, 0, View{}}), kThreeThreads);
    for (const int32_t length : outputs.effective_length) CHECK(length == 0);
  }
  TokenStats stats;
  compute(stats.args(c), kThreeThreads);
}

TEST(an_instruction_set_is_chosen_by_name) {
  const std::vector<std::string> names = instruction_sets();
  CHECK(!names.empty() && names.back() == "portable");
  for (const std::string& name : names) CHECK(set_instruction_set(name) && instruction_set() == name);
  CHECK(!set_instruction_set("sse9") && instruction_set() == names.back());
  CHECK(set_instruction_set(names.front()));
}

}  // namespace
