// The launchers that the table in q_matmul.cu chooses from; each takes what its row there says.
#pragma once

#include "../launch.h"
